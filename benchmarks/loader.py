"""Speed of reading tokenized corpora, and what packing documents wastes.

    python benchmarks/loader.py [--folder /some/disk]

Opens corpora of 10**12 tokens, sparse files, each in a process of its own: memory is what the peak
of resident pages rose by. Reads rows of 2048 positions in shuffled order from documents of
log-normal length, on one core, with the files in the page cache. Packs the same documents as Grain
does, whose packing takes the documents in their order and depends on all of those before.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grain
import numpy as np
import tyro
from _report import Row, report, run_in_subprocess, write_json

from hymba_jax.data.batch import Batch, make_row
from hymba_jax.data.document_rows import ROWS_PER_BLOCK, DocumentRows
from hymba_jax.data.megatron import MegatronWriter
from hymba_jax.data.mixture import Mixture
from hymba_jax.data.permutation import shuffled_row
from hymba_jax.data.token_store import TokenStore, open_tokens

SIGMA = 1.0  # of the logarithms of documents' lengths
EOS, VOCABULARY = 2, 32001


@dataclass(frozen=True)
class Args:
    """Sizes.

    Attributes:
      folder: where the files are written; a temporary one if absent.
      huge: tokens of the corpora that are opened.
      huge_documents: documents of the one in Megatron's format.
      tokens: of the corpora that are read.
      mean: tokens of a document.
      length: positions of a row.
      rows: that are read.
      open: a corpus to open in this process, with --row.
      row: only that corpus's row, into the JSON file.
      json: also written there.
    """

    folder: str = ""
    huge: int = 10**12
    huge_documents: int = 1 << 24
    tokens: int = 20_000_000
    mean: int = 500
    length: int = 2048
    rows: int = 1500
    open: str = ""
    row: bool = False
    json: Path | None = None


def run(args: Args) -> None:
    """Measures and prints the tables."""
    if args.row:
        assert args.json is not None
        write_json([opened(args.open)], args.json)
        return
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        rows = [*huge_corpora(Path(folder), args.huge, args.huge_documents)]
        report(f"opening {args.huge:.0e} tokens", rows)
        lengths = document_lengths(args.tokens, args.mean)
        paths = write_documents(Path(folder), lengths)
        title = f"rows of {args.length}, documents of {args.mean} tokens on average"
        speeds = [*reading_speeds(paths, args.length, args.rows)]
        report(f"reading {title}, shuffled, one core", speeds)
        waste = [*packings(open_tokens(paths[:1]), lengths, args.length)]
        report(f"packing {title}", waste)
    if args.json is not None:
        write_json([*rows, *speeds, *waste], args.json)


def huge_corpora(folder: Path, tokens: int, documents: int) -> Iterator[Row]:
    """Opens a flat corpus and one in Megatron's format, whose tokens are holes in their files."""
    with (folder / "flat.bin").open("wb") as file:
        file.truncate(2 * tokens)
    yield run_in_subprocess(__file__, ["--open", str(folder / "flat.bin")])
    (folder / "flat.bin").unlink()
    size = tokens // documents
    with (folder / "huge.bin").open("wb") as file:
        file.truncate(2 * size * documents)
    with (folder / "huge.idx").open("wb") as file:
        header = b"MMIDIDX\0\0", np.array([1], "<u8"), b"\x08", np.array([documents], "<u8")
        for part in (*header, np.array([documents + 1], "<u8")):
            file.write(part)
        file.write(np.full(documents, size, "<i4"))
        file.write(np.arange(documents, dtype="<i8") * size * 2)
        file.write(np.arange(documents + 1, dtype="<i8"))
    yield run_in_subprocess(__file__, ["--open", str(folder / "huge.idx")])
    for name in ("huge.bin", "huge.idx"):
        (folder / name).unlink()


def opened(path: str) -> Row:
    """Time and memory of opening a corpus, and of looking for documents in the middle of it."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _memory("VmRSS")
    start = time.perf_counter()
    store = open_tokens([path], "uint16", EOS)
    seconds = time.perf_counter() - start
    middle = store.num_tokens // 2
    store.document_starts(middle, middle + 2_000_000)
    rose = (_memory("VmHWM") - before) / 1e6
    return {
        "corpus": Path(path).name,
        "tokens": f"{store.num_tokens:.3g}",
        "documents": str(store.num_documents or "unknown"),
        "ms to open": 1e3 * seconds,
        "and find documents": 1e3 * (time.perf_counter() - start),
        "peak rose by MB": rose,
        "process MB": _memory("VmHWM") / 1e6,
    }


def _memory(kind: str) -> int:
    """Bytes of resident pages, mapped files included: now (VmRSS), or at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return next(
        1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(kind)
    )


def document_lengths(tokens: int, mean: int) -> np.ndarray:
    """Of documents that have about so many tokens together."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, tokens // mean)
    return np.maximum(lengths, 2).astype(int)


def write_documents(folder: Path, lengths: np.ndarray) -> list[Path]:
    """Random documents in Megatron's format, flat and as `.npy`."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(EOS + 1, VOCABULARY, lengths.sum(), np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOS
    with MegatronWriter(folder / "megatron", VOCABULARY) as writer:
        for document in np.split(tokens, np.cumsum(lengths)[:-1]):
            writer.write([document])
    tokens.tofile(folder / "eos.bin")
    np.save(folder / "eos.npy", tokens)
    return [folder / name for name in ("megatron.idx", "eos.bin", "eos.npy")]


def reading_speeds(paths: list[Path], length: int, count: int) -> Iterator[Row]:
    """Tokens a second of windows and of rows of documents, and the time that their order takes."""
    for path in paths:
        store = open_tokens([path], "uint16", EOS)
        documents = DocumentRows(store, length)
        num_windows = (store.num_tokens - 1) // length
        readers: dict[str, tuple[int, Callable[[int], Batch]]] = {
            "windows of the stream": (num_windows, partial(window, store, length)),
            "whole documents": (len(documents), documents.__getitem__),
        }
        for name, (num_rows, read) in readers.items():
            order = [shuffled_row(i, num_rows, 0, "source")[1] for i in range(count)]
            seconds = _seconds(read, order)
            yield {
                "corpus": path.name,
                "rows": name,
                "us a row": 1e6 * seconds / count,
                "1e6 tokens/s": count * length / seconds / 1e6,
            }
    mixture = Mixture({"web": 0.6, "code": 0.3, "mathematics": 0.1})

    def ordered(i: int) -> tuple[int, int]:
        source, position = mixture(i)
        return shuffled_row(position, 10**9, 0, source)

    seconds = _seconds(ordered, range(count))
    yield {
        "corpus": "",
        "rows": "mixture and order alone",
        "us a row": 1e6 * seconds / count,
        "1e6 tokens/s": count * length / seconds / 1e6,
    }


def window(store: TokenStore, length: int, index: int) -> Batch:
    """A row of the stream, without regard to documents."""
    return make_row(store.read(index * length, (index + 1) * length + 1), length)


def _seconds(read: Callable[[int], object], indices: list[int] | range) -> float:
    for i in indices[:50]:
        read(i)
    start = time.process_time()
    for i in indices:
        read(i)
    return time.process_time() - start


def packings(store: TokenStore, lengths: np.ndarray, length: int) -> Iterator[Row]:
    """What each way of packing wastes, on the same documents."""
    rows = DocumentRows(store, length)
    start = time.process_time()
    ids = np.stack([np.asarray(rows[i].segment_ids) for i in range(len(rows))])
    yield _packing_row("hymba_jax, random access", ids, lengths, start)
    # Those of Grain take no documents longer than a row, and split none: cut as they are here.
    targets = np.concatenate([_cut(size, length) for size in (lengths - 1).tolist()])
    for name, packing in (
        ("grain FirstFit, iterator", grain.experimental.FirstFitPackIterDataset),
        ("grain BestFit, iterator", grain.experimental.BestFitPackIterDataset),
    ):
        parent = grain.MapDataset.source(targets).map(lambda size: {"x": np.ones(size, np.int32)})
        start = time.process_time()
        packed = packing(
            parent.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
            length_struct={"x": length},
            num_packing_bins=ROWS_PER_BLOCK,
            shuffle_bins=False,
        )
        ids = np.stack([row["x_segment_ids"] for row in packed])
        yield _packing_row(name, ids, lengths, start)


def _cut(size: int, length: int) -> np.ndarray:
    """A document in pieces of at most a row."""
    return np.array([length] * (size // length) + [size % length] * (size % length > 0), int)


def _packing_row(name: str, ids: np.ndarray, lengths: np.ndarray, start: float) -> Row:
    seconds = time.process_time() - start
    assert np.count_nonzero(ids) == (lengths - 1).sum()
    longer = -(-(lengths - 1) // ids.shape[1]) - 1
    return {
        "packing": name,
        "rows": str(len(ids)),
        "padding %": 100 * float(np.mean(ids == 0)),
        "documents": str(len(lengths)),
        "splits": str(int(ids.max(axis=1).sum()) - len(lengths)),
        "of those longer than a row": str(longer.sum()),
        "1e6 tokens/s": ids.size / seconds / 1e6,
    }


if __name__ == "__main__":
    run(tyro.cli(Args))
