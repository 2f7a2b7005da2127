"""`hymba tokenize` against the tokenizers library's encode_batch alone, on the same cores.

python benchmarks/tokenize_corpus.py [--megabytes 100 --vocab 8192] [--json FILE]

The text is that of the running Python's standard library, again and again, as JSON lines. Starting
processes is not counted, the reading, checksums and writing are.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import tyro
from _report import Row, report

from hymba_jax.data import tokenize_records
from hymba_jax.data.corpus import Corpus, standard_library
from hymba_jax.data.encoder import Encoder
from hymba_jax.data.listing import list_files
from hymba_jax.data.tokenize_corpus import CorpusWriter
from hymba_jax.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Options:
    """Sizes.

    Attributes:
      megabytes: UTF-8 of the text.
      vocab: of a BPE that is trained on the standard library.
      characters: of a document, at most.
    """

    megabytes: int = 100
    vocab: int = 8192
    characters: int = 4000
    json: Path | None = None


def texts_of(options: Options) -> Iterator[str]:
    """Documents of the size asked for, until there is enough text."""
    left = options.megabytes * 1_000_000
    for document in cycle(list(standard_library(0).training_texts())):
        for start in range(0, len(document), options.characters):
            text = document[start : start + options.characters]
            yield text
            left -= len(text.encode())
            if left <= 0:
                return


def own_bytes(process: int) -> int:
    """Memory of a process and those it started, each page shared by n of them an n-th."""
    total = 0
    pending = [process]
    while pending:
        current = pending.pop()
        try:
            rollup = Path(f"/proc/{current}/smaps_rollup").read_text()
            children = Path(f"/proc/{current}/task/{current}/children").read_text()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line[:4] == "Pss:")
        pending += map(int, children.split())
    return 1024 * total


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Gives, at the end of the context, the MB that this process and its workers had at most."""
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.2):
            peak = max(peak, own_bytes(os.getpid()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak / 1e6
    finally:
        ended.set()
        thread.join()


def encode_alone(tokenizer: Tokenizer, method: str, texts: list[str]) -> float:
    """Seconds that the library takes by its own threads, a million characters at a time."""
    encode = getattr(tokenizer.model, method)
    size = max(1, 1_000_000 * len(texts) // sum(map(len, texts)))
    begun = time.perf_counter()
    for start in range(0, len(texts), size):
        encode(texts[start : start + size], add_special_tokens=False)
    return time.perf_counter() - begun


def tokenize(tokenizer: Tokenizer, file: Path, output: Path, workers: int) -> float:
    """Seconds that a corpus takes, its worker processes being there."""
    output.mkdir()
    listing = list_files(str(file))
    corpus = Corpus(str(file), listing.files, validation_fraction=0.05)
    tokenize_records.begin(output, corpus.options, listing.files)
    writer = CorpusWriter(corpus, tokenizer, output, lambda progress: None)
    with Encoder(tokenizer, workers) as encoder:
        # A batch for each: one is started when there is work and none is idle.
        list(encoder.encode([("starts a worker " * (1 << 16), None)] * workers))
        begun = time.perf_counter()
        writer.write(encoder)
        return time.perf_counter() - begun


def main(options: Options) -> None:
    tokenizer = build_tokenizer(f"bpe:{options.vocab}", standard_library(0).training_texts())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "corpus.jsonl")
        with file.open("w") as lines:
            for text in texts_of(options):
                lines.write(json.dumps({"text": text}) + "\n")
        cores = len(os.sched_getaffinity(0))
        for workers in (1, cores):
            with peak_memory() as megabytes:
                seconds = tokenize(tokenizer, file, Path(directory, str(workers)), workers)
            name = f"hymba tokenize, {workers} workers"
            rows.append({"": name, "MB/s": options.megabytes / seconds, "peak MB": megabytes()})
    for method in ("encode_batch", "encode_batch_fast"):
        with peak_memory() as megabytes:
            seconds = encode_alone(tokenizer, method, list(texts_of(options)))
        alone = options.megabytes / seconds
        rows.append({"": f"{method} alone", "MB/s": alone, "peak MB": megabytes()})
    for row in rows:
        row["of the last"] = float(row["MB/s"]) / alone
    report(f"tokenizing {options.megabytes} MB on {cores} cores", rows, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
