"""Shards of tokens: what is in them, and that nothing but files and options decides their bytes."""

import hashlib
import itertools
import json
import os
import random
import resource
import signal
import struct
import time

import numpy as np
import pytest
from data.interrupted import tokenize_interrupted

from hymba_jax.data import encoder as encoder_module
from hymba_jax.data import records, tokenize_command, tokenize_records
from hymba_jax.data.encoder import Encoder
from hymba_jax.data.listing import File
from hymba_jax.data.tokenize_command import TokenizeConfig, TokenizeDataConfig
from hymba_jax.data.tokenize_progress import Progress, ProgressLine
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import Tokenizer, build_tokenizer

WORDS = ["a ", "red ", "hat\n", "and ", "the ", "été ", "old ", "dog ", "ran. ", "Who ", "sat? "]


@pytest.fixture
def small(monkeypatch):
    """Units of few files, shards of few tokens and documents of several pieces."""
    monkeypatch.setattr(tokenize_records, "UNIT_BYTES", 2_000)
    monkeypatch.setattr(tokenize_records, "SHARD_TOKENS", 600)
    monkeypatch.setattr(records, "PIECE", 400)


@pytest.fixture
def corpus(tmp_path):
    """Files of one document and of many, and their documents in order."""
    directory, rng = tmp_path / "corpus", random.Random(0)
    directory.mkdir()
    documents = []
    for number in range(6):
        texts = ["".join(rng.choices(WORDS, k=rng.randrange(1, 300))) for _ in range(4)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / f"{number}.jsonl").write_text(lines)
        (directory / f"{number}.txt").write_text(texts[0])
        documents += [*texts, texts[0]]
    return directory, documents


def tokenize(corpus, output, data=None, **options):
    data = TokenizeDataConfig(str(corpus), validation_fraction=0.3, **data or {})
    options = {"tokenizer": "bpe:300", "workers": 1} | options
    tokenize_command.main(TokenizeConfig(str(output), data, **options))


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def read_documents(directory, side):
    """The documents in the shards of a side, as Megatron's format has them."""
    documents = []
    for path in sorted(directory.glob(f"{side}-*.idx")):
        index = path.read_bytes()
        magic, version, code, sequences, entries = struct.unpack_from("<9sQBQQ", index)
        assert (magic, version, code) == (b"MMIDIDX\0\0", 1, 8)
        assert entries == sequences + 1  # a sequence for each document
        lengths = np.frombuffer(index, "<i4", sequences, 34)
        pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
        tokens = path.with_suffix(".bin").read_bytes()
        documents += [
            np.frombuffer(tokens, "<u2", length, pointer).tolist()
            for length, pointer in zip(lengths, pointers, strict=True)
        ]
    return documents


def pieces(text, size):
    """A text as the pieces that end at its last line end within `size`, if there is one."""
    while len(text) > size:
        end = text.rfind("\n", 0, size) + 1 or size
        yield text[:end]
        text = text[end:]
    yield text


def is_held_out(text):
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return int(digest, 16) / 2**64 < 0.3


@pytest.mark.parametrize("workers", [1, 3])
def test_shards_hold_each_document_as_it_is_encoded(small, corpus, tmp_path, workers):
    directory, documents = corpus
    output = tmp_path / "out"
    tokenize(directory, output, workers=workers)
    tokenizer = Tokenizer.load(output)
    expected = {"train": [], "validation": []}
    for text in documents:
        parts = list(pieces(text, 400))
        ids = [token for part in parts for token in tokenizer.encode(part)]
        side = "validation" if is_held_out(parts[0]) else "train"
        expected[side].append(([1, *ids, 2], len(text.encode())))
    manifest = json.loads((output / "manifest.json").read_text())
    for side, pairs in expected.items():
        assert read_documents(output, side) == [ids for ids, _ in pairs]
        about = manifest[side]
        assert about["documents"] == len(pairs) > 5
        assert about["tokens"] == sum(len(ids) for ids, _ in pairs)
        assert about["text_bytes"] == sum(size for _, size in pairs)
        names = sorted(path.stem for path in output.glob(f"{side}-*.idx"))
        assert [shard["name"] for shard in about["shards"]] == names
    assert len(manifest["train"]["shards"]) > manifest["sources"][0]["files"] / 2
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint


def test_a_bpe_is_trained_on_the_training_side(small, corpus, tmp_path):
    directory, documents = corpus
    tokenize(directory, tmp_path / "out")
    texts = []
    for text in documents:
        parts = list(pieces(text, 400))
        texts += [] if is_held_out(parts[0]) else parts
    expected = build_tokenizer("bpe:300", texts)
    assert Tokenizer.load(tmp_path / "out").fingerprint == expected.fingerprint


def test_interrupted_or_in_parts_the_bytes_are_the_same(small, corpus, tmp_path, monkeypatch):
    directory, _ = corpus
    tokenize(directory, tmp_path / "whole")
    expected = contents(tmp_path / "whole")

    stopped = tmp_path / "stopped"
    stops = tokenize_interrupted(
        lambda: tokenize(directory, stopped),
        stopped,
        monkeypatch,
        0.05,
        lambda stops: (stopped / f"train-00000-000.bin.{stops}.partial").touch(),
    )
    assert stops > 3
    assert contents(stopped) == expected

    output = tmp_path / "parts"
    with pytest.raises(HymbaError, match="train it once, with --tokenizer-only"):
        tokenize(directory, output, part="1/3")
    tokenize(directory, output, tokenizer_only=True)
    for part in ("3/3", "1/3"):
        tokenize(directory, output, part=part)
        assert not (output / "manifest.json").exists()
    tokenize(directory, output, part="2/3")
    assert contents(output) == expected


def test_another_chat_template_than_that_of_the_tokenizer_there_is_refused(corpus, tmp_path):
    directory, _ = corpus
    template, output = tmp_path / "chat.jinja", tmp_path / "out"
    template.write_text("{{ messages }}")
    tokenize(directory, output, tokenizer_only=True, chat_template=str(template))
    tokenize(directory, output, tokenizer_only=True, chat_template=str(template))
    template.write_text("{{ messages[0] }}")
    with pytest.raises(HymbaError, match="was begun with another chat template than"):
        tokenize(directory, output, tokenizer_only=True, chat_template=str(template))


def test_a_corpus_that_is_done_stays(corpus, tmp_path, capsys):
    directory, documents = corpus
    tokenize(directory, tmp_path / "out")
    before = contents(tmp_path / "out")
    capsys.readouterr()
    tokenize(directory, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    shown = capsys.readouterr().out
    assert "was tokenized already" in shown
    manifest = json.loads(before["manifest.json"])
    count = manifest["train"]["documents"]
    assert count + manifest["validation"]["documents"] == len(documents)
    assert f"train: {count} documents, " in shown


def test_what_differs_is_refused(corpus, tmp_path):
    directory, _ = corpus
    output = tmp_path / "out"
    (tmp_path / "tokenizer").mkdir()
    name = str(tmp_path / "tokenizer")
    build_tokenizer("bytes", ()).save(name)
    tokenize(directory, output, tokenizer=name)
    for options, message in (
        ({"data": {"text_field": "body"}}, "text_field 'text', which is 'body' now"),
        ({"tokenizer": "bytes"}, "tokenizer '.*', which is 'bytes' now"),
    ):
        with pytest.raises(HymbaError, match=rf"out: was begun with {message}: give the same"):
            tokenize(directory, output, **{"tokenizer": name, **options})
    size = (directory / "3.txt").stat().st_size
    with (directory / "3.txt").open("a") as file:
        file.write("more")
    changed = f"3.txt has {size + 4} bytes instead of {size}"
    with pytest.raises(HymbaError, match=f"other files: {changed}: give"):
        tokenize(directory, output, tokenizer=name)
    (directory / "3.txt").unlink()
    (directory / "4.txt.new").write_text("new")
    with pytest.raises(HymbaError, match=r"other files: 3.txt is gone \(and 1 more\)"):
        tokenize(directory, output, tokenizer=name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(HymbaError, match=r"mine: holds thesis\.tex, which is not of"):
        tokenize(directory, tmp_path / "mine", tokenizer=name)


def test_what_has_no_shards_yet_begins_anew(tmp_path):
    """With a file that was fixed, and with the option that the error names."""
    lines = [json.dumps({"text": text}) for text in WORDS * 3]
    path, output = tmp_path / "corpus.jsonl", tmp_path / "out"
    path.write_text("\n".join([*lines, "bad"]))
    with pytest.raises(HymbaError, match=r"--data\.on-bad-record skip"):
        tokenize(path, output, tokenizer="bytes")
    path.write_text("\n".join([*lines, "worse"]))
    tokenize(path, output, {"on_bad_record": "skip"}, tokenizer="bytes")
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["skipped"], manifest["options"]["on_bad_record"]) == (1, "skip")
    path.write_text("\n".join([*lines, "other"]))
    os.utime(path, ns=(0, 0))
    with pytest.raises(HymbaError, match=r"other files: corpus\.jsonl was modified: give the same"):
        tokenize(path, output, {"on_bad_record": "skip"}, tokenizer="bytes")


def test_a_small_corpus_has_both_sides(tmp_path):
    """By the lowest hash or the highest, where the fraction leaves one empty."""
    texts = [f"text {number}" for number in range(60)]
    held = [text for text in texts if is_held_out(text)]
    kept = [text for text in texts if not is_held_out(text)]

    def value(text):
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    for name, chosen in (("kept", kept[:4]), ("held", held[:3])):
        for number, text in enumerate(chosen):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number}.txt").write_text(text)
        tokenize(tmp_path / name, tmp_path / f"{name}-out", tokenizer="bytes")
        decode = Tokenizer.load(tmp_path / f"{name}-out").decode
        train, validation = (
            {decode(ids) for ids in read_documents(tmp_path / f"{name}-out", side)}
            for side in ("train", "validation")
        )
        assert train | validation == set(chosen)
        alone = validation if name == "kept" else train
        assert alone == {min(chosen, key=value) if name == "kept" else max(chosen, key=value)}


@pytest.mark.parametrize("beside", [b"\0", None], ids=["a bad one", "a copy"])
def test_the_only_text_of_a_directory_gives_its_tail(tmp_path, beside):
    text = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(text)
    (tmp_path / "corpus" / "b.txt").write_bytes(beside or text.encode())
    output = tmp_path / "out"
    tokenize(tmp_path / "corpus", output, {"on_bad_record": "skip"}, tokenizer="bytes")
    decode = Tokenizer.load(output).decode
    train, validation = (
        [decode(ids) for ids in read_documents(output, side)] for side in ("train", "validation")
    )
    assert len(train) == len(validation) == (1 if beside else 2)
    assert set(train) == {train[0]}
    assert {train[0] + each for each in validation} == {text}


def test_another_tokenizer_of_the_same_name_is_refused(corpus, tmp_path):
    directory, _ = corpus
    name = str(tmp_path / "tokenizer")
    build_tokenizer("bytes", ()).save(name)
    tokenize(directory, tmp_path / "out", tokenizer=name, tokenizer_only=True)
    build_tokenizer("bpe:270", ["the the the the"]).save(name)
    with pytest.raises(HymbaError, match=r"out: was begun with another tokenizer than .* is now"):
        tokenize(directory, tmp_path / "out", tokenizer=name)


def test_one_document_gives_its_tail_to_validation(small, tmp_path):
    text = "".join(f"line {number} é\n" for number in range(200))
    (tmp_path / "one.txt").write_text(text)
    tokenize(tmp_path / "one.txt", tmp_path / "out", tokenizer="bytes")
    tokenizer = Tokenizer.load(tmp_path / "out")
    (train,), (validation,) = (
        read_documents(tmp_path / "out", side) for side in ("train", "validation")
    )
    assert (train[0], train[-1], validation[0], validation[-1]) == (1, 2, 1, 2)
    texts = [tokenizer.decode(ids) for ids in (train, validation)]
    assert "".join(texts) == text
    assert abs(len(texts[1]) - 0.3 * len(text)) < 10


def test_bad_records_are_counted_once(small, corpus, tmp_path, capsys):
    directory, _ = corpus
    for number in (1, 4):
        with (directory / f"{number}.jsonl").open("a") as file:
            file.write("bad\n[]\n")
    with pytest.raises(HymbaError, match=r"1\.jsonl: 2 problems"):
        tokenize(directory, tmp_path / "stopped", tokenizer="bytes")
    tokenize(directory, tmp_path / "out", {"on_bad_record": "skip"}, tokenizer="bytes")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"] == 4
    lists = sorted((tmp_path / "out" / "units").glob("*.skipped.jsonl"))
    listed = [json.loads(line) for path in lists for line in path.read_text().splitlines()]
    assert [line["name"] for line in listed] == [f"{n}.jsonl:{m}" for n in (1, 4) for m in (5, 6)]
    assert "not a JSON object" in listed[1]["reason"]
    assert "skipped records: 4, listed in " in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_continues(corpus, tmp_path):
    directory, _ = corpus
    tokenize(directory, tmp_path / "whole", tokenizer="bytes")
    output = tmp_path / "out"
    tokenize(directory, output, tokenizer="bytes", tokenizer_only=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(HymbaError, match=r"out: cannot be written \(File too large\): make ro"):
            tokenize(directory, output, tokenizer="bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [name for name in contents(output) if name.endswith((".partial", ".bin", ".lock"))]
    tokenize(directory, output, tokenizer="bytes")
    assert contents(output) == contents(tmp_path / "whole")


def test_two_of_the_same_part_are_refused(corpus, tmp_path, monkeypatch):
    directory, _ = corpus
    refused = []

    def again(*_):
        for part in ("1/1", "1/2"):
            with pytest.raises(HymbaError, match="is writing there") as caught:
                tokenize(directory, tmp_path / "out", tokenizer="bytes", part=part)
            refused.append(str(caught.value))
        monkeypatch.undo()

    monkeypatch.setattr(ProgressLine, "show", again)
    tokenize(directory, tmp_path / "out", tokenizer="bytes")
    assert "`hymba tokenize` of the same part" in refused[0]
    assert "with another number of parts" in refused[1]
    assert not list((tmp_path / "out").glob("*.lock"))


def test_every_core_tokenizes_where_a_system_does_not_say_which_are_free(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert encoder_module.default_workers(1 << 40) == 5


def test_a_worker_that_dies_is_one_line(monkeypatch):
    monkeypatch.setattr(encoder_module, "_BATCH", 1000)
    tokenizer = build_tokenizer("bytes", ())
    with Encoder(tokenizer, 2) as encoder:
        # Without an end: whatever the workers have finished, one is asked for more.
        encoded = encoder.encode((f"text {n} " * 200, n) for n in itertools.count())
        (first, number) = next(encoded)
        assert (len(first.ids), first.text_bytes, number) == (1_400, 1_400, 0)
        workers = list(encoder._pool._processes)
        os.kill(workers[0], signal.SIGKILL)
        with pytest.raises(HymbaError, match=r"a worker process has died.*run the same command"):
            for _ in encoded:
                pass
    for worker in workers:  # none is left behind
        wait_for_end(worker)


def wait_for_end(process):
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process} is still there")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "5/4"}, "part is '5/4': give i/n"),
        ({"part": "0/4"}, "part is '0/4'"),
        ({"part": "half"}, "part is 'half'"),
        ({"workers": -1}, "workers is -1, below 0"),
        ({"tokenizer": ""}, "tokenizer is missing"),
        ({"data": TokenizeDataConfig("")}, "data.path is missing"),
        (
            {"data": TokenizeDataConfig("a", validation_fraction=1.0)},
            r"fraction is 1.0, not in \[0",
        ),
        (
            {"data": TokenizeDataConfig("a", format="chat", text_field="body")},
            "data.text_field has no effect on data.format chat",
        ),
        ({"output": ""}, "output is empty"),
        ({"check": True}, "data has no effect with check.*tokenizer has no effect with check"),
        ({"check": True, "part": "1/2", "workers": 2}, "workers has no .*part has no effect with"),
    ],
)
def test_impossible_options(options, message):
    good = {"output": "out", "data": TokenizeDataConfig("corpus"), "tokenizer": "bytes"}
    TokenizeConfig(**good)
    with pytest.raises(HymbaError, match=message):
        TokenizeConfig(**good | options)


def test_progress_follows_the_bytes_that_are_read(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module, "_BATCH", 1000)
    directory, _ = corpus
    shown = []
    monkeypatch.setattr(
        ProgressLine,
        "show",
        lambda self, progress: shown.append((progress.done_bytes, progress.tokens)),
    )
    tokenize(directory, tmp_path / "out", tokenizer="bytes")
    total = sum(path.stat().st_size for path in directory.iterdir())
    assert shown == sorted(shown)
    assert shown[-1][0] <= total
    assert len({done for done, _ in shown}) > 5

    progress = Progress(4_000_000)
    progress.documents, progress.text_bytes, progress.tokens = 40, 6_000_000, 1_000_000
    progress.skip([File("done", "done", 1_000_000)])  # since the start half of it was done
    line = ProgressLine(Display(quiet=True))._line(progress, 20.0, 500_000)
    assert line == "25.0%, 2 documents/s, 0.3 MB/s, 50 k tokens/s, 0:02:00 left"
