import hashlib
import json
import os
import socket
import sysconfig
from pathlib import Path

import pytest

from hymba_jax.config.data import DataConfig
from hymba_jax.data.records import Document
from hymba_jax.data.sources import is_held_out, load_documents
from hymba_jax.errors import HymbaError


def all_documents(config):
    corpus = load_documents(config)
    return sorted([*corpus.train, *corpus.validation], key=lambda document: document.name)


def write_texts(directory, count=40):
    for number in range(count):
        (directory / f"{number:03}.txt").write_text(f"text {number}\n", encoding="utf-8")


def write_lines(path, *lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def error_of(config):
    with pytest.raises(HymbaError) as caught:
        load_documents(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_directory_of_text_files(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "café.md").write_bytes("\ufeffnaïve\r\nδ".encode())
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_bytes(b"\0\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"\0\xff")

    documents = all_documents(DataConfig(path=str(tmp_path), validation_fraction=0.25))

    assert documents == [
        *(Document(f"{number:03}.txt", f"text {number}\n") for number in range(40)),
        Document("nested/café.md", "naïve\r\nδ"),  # line ends kept, byte order mark dropped
    ]


def test_split_is_by_hash_of_the_name_and_stable(tmp_path):
    write_texts(tmp_path)
    config = DataConfig(path=str(tmp_path), validation_fraction=0.25)
    before = load_documents(config)
    expected = [
        name
        for name in sorted(os.listdir(tmp_path))
        if int(hashlib.sha1(name.encode()).hexdigest()[:2], 16) % 4 == 0
    ]
    assert [document.name for document in before.validation] == expected
    assert load_documents(config) == before

    (tmp_path / "another.txt").write_text("more")
    after = load_documents(config)
    assert set(before.validation) <= set(after.validation)
    assert set(before.train) <= set(after.train)


@pytest.mark.parametrize("fraction", [0.004, 0.05, 0.1, 0.3, 0.5, 0.7, 0.99])
def test_about_the_fraction_is_held_out(fraction):
    names = [f"document {number}" for number in range(10_000)]
    share = sum(is_held_out(name, fraction) for name in names) / len(names)
    assert abs(share - fraction) < 1 / 256 + 0.01  # a step of the hash, and twice its deviation


def test_json_lines(tmp_path):
    path = tmp_path / "corpus.jsonl"
    texts = ["plain", 'quo"te\n\ttab', "é \U0001f600 \u2028 line separator", "x" * 5000]
    lines = [json.dumps({"id": 1, "body": text}).encode() for text in texts]
    write_lines(path, lines[0], b"", lines[1], b'{"body": ""}', *lines[2:])
    for given in (path, tmp_path):
        documents = all_documents(
            DataConfig(str(given), text_field="body", validation_fraction=0.4)
        )
        assert documents == [
            Document(f"corpus.jsonl:{line}", text)
            for line, text in zip((1, 3, 5, 6), texts, strict=True)
        ]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"text": "a"', ["broken JSON", "column"]),
        (b"text", ["broken JSON", "column 1", "fix or remove"]),
        (b'{"body": "a", "n": 1}', ["no field 'text'", "'body', 'n'", "text_field"]),
        (b"{}", ["no field 'text'", "none"]),
        (b'["a"]', ["not a JSON object"]),
        (b'{"text": 3}', ["field 'text' is not a string"]),
        (b'{"text": "\xff"}', ["not UTF-8", "byte 10"]),
        (b'{"text": "\\ud800"}', ["surrogate"]),
        (b'{"a":' + b"[" * 100_000, ["unreadable JSON"]),
    ],
)
def test_bad_json_line_is_named(tmp_path, line, parts):
    path = tmp_path / "corpus.jsonl"
    write_lines(path, b'{"text": "good"}', b"", line)
    message = error_of(DataConfig(path=str(path)))
    for part in [f"{path}, line 3:", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"ab\0c", "binary, not text (byte 2"),
        ("\ufeffab\0c".encode(), "binary, not text (byte 5"),
        (b"\x89PNG\r\n", "not UTF-8 text (byte 0)"),
        ("é".encode("latin-1"), "not UTF-8 text (byte 0)"),
    ],
)
def test_binary_file_is_named(tmp_path, content, part):
    write_texts(tmp_path)
    (tmp_path / "bad.txt").write_bytes(content)
    message = error_of(DataConfig(path=str(tmp_path)))
    assert f"{tmp_path}/bad.txt: {part}" in message


def test_nothing_to_read(tmp_path):
    missing = tmp_path / "missing"
    assert f"{missing}: no such file or directory" in error_of(DataConfig(path=str(missing)))
    assert f"{tmp_path}: no text found" in error_of(DataConfig(path=str(tmp_path)))
    empty = tmp_path / "empty.jsonl"
    write_lines(empty, b"", b'{"text": ""}')
    assert f"{empty}: no text found" in error_of(DataConfig(path=str(empty)))
    lone = tmp_path / "book.txt"
    lone.write_text("text")
    assert f"{lone}: neither a directory nor" in error_of(DataConfig(path=str(lone)))


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    write_texts(tmp_path, 2)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hymba_jax.data.sources.open_regular", refuse)
    assert "000.txt: cannot be read (Permission denied)" in error_of(DataConfig(path=str(tmp_path)))


def test_empty_side_names_a_split_that_works(tmp_path):
    kept = [name for name in map(str, range(1000)) if not is_held_out(name, 0.05)][:6]
    for name in kept:
        (tmp_path / name).write_text(name)
    message = error_of(DataConfig(path=str(tmp_path)))
    assert "validation_fraction 0.05 leaves no validation document of 6" in message
    advised = float(message.split("set validation_fraction to ")[1].split()[0])
    assert load_documents(DataConfig(path=str(tmp_path), validation_fraction=advised)).validation

    for name in kept[1:]:
        (tmp_path / name).unlink()
    assert "add documents" in error_of(DataConfig(path=str(tmp_path)))

    (tmp_path / kept[0]).unlink()
    held = next(name for name in map(str, range(1000)) if is_held_out(name, 0.05))
    (tmp_path / held).write_text(held)
    assert "leaves no training document of 1" in error_of(DataConfig(path=str(tmp_path)))


def test_standard_library_split():
    corpus = load_documents(DataConfig())
    assert load_documents(DataConfig()) == corpus
    names = {document.name for document in corpus.train + corpus.validation}
    assert len(names) == len(corpus.train) + len(corpus.validation) > 400
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any(name.startswith(("test/", "idlelib/", "site-packages/")) for name in names)
    for document in corpus.validation:
        digest = hashlib.sha1(document.name.split("/")[-1].encode()).digest()
        assert digest[0] % 20 == 0

    decoder = next(d for d in corpus.train + corpus.validation if d.name == "json/decoder.py")
    source = Path(sysconfig.get_path("stdlib"), "json", "decoder.py").read_text(encoding="utf-8")
    assert decoder.text == source


def test_what_is_no_document_is_left_out_and_counted(tmp_path):
    write_texts(tmp_path)
    before = all_documents(DataConfig(path=str(tmp_path), validation_fraction=0.25))
    os.mkfifo(tmp_path / "fifo.jsonl")  # opening it would wait for a writer
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / ".hidden").touch()
    (tmp_path / "empty").touch()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))  # of at most 108 characters
        config = DataConfig(path=str(tmp_path), validation_fraction=0.25)
        assert all_documents(config) == before
        assert load_documents(config).left_out == (
            "FIFOs: 2, broken links: 2, devices: 1, files without text: 1, hidden entries: 1, "
            "links to directories: 1, sockets: 1"
        )


def test_a_link_to_a_file_is_that_file(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "link.txt").symlink_to("000.txt")
    documents = all_documents(DataConfig(path=str(tmp_path), validation_fraction=0.25))
    assert Document("link.txt", "text 0\n") in documents


@pytest.mark.parametrize("name", ["fifo.jsonl", "device.jsonl", "dangling.jsonl", "loop.jsonl"])
def test_a_path_that_is_no_regular_file_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    what = {"fifo": "is a FIFO", "device": "is a device"}.get(name[:-6], "no such file")
    message = error_of(DataConfig(path=str(tmp_path / name)))
    assert message.startswith(f"{tmp_path / name}: {what}")


@pytest.mark.parametrize("name", ["big.txt", "big.jsonl"])
def test_a_document_too_large_for_memory_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr("hymba_jax.data.sources._LARGEST_DOCUMENT", 1000)
    write_texts(tmp_path)
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 42)  # 4 TiB of zeros, which take no room
    message = error_of(DataConfig(path=str(tmp_path)))
    assert message.startswith(f"{tmp_path / name}")
    assert "split it into several" in message


def make_run(directory):
    (directory / "checkpoints" / "3").mkdir(parents=True)
    (directory / "checkpoints" / "3" / "array").write_bytes(b"\0\xff")
    for name in ("config.toml", "tokenizer.json", "sample.txt", "metrics.jsonl"):
        (directory / name).write_text("{}")


def test_run_directories_are_no_text(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "config.toml").write_text("of no run")
    config = DataConfig(path=str(tmp_path), validation_fraction=0.25)
    first = load_documents(config, str(tmp_path / "runs" / "mine"))
    assert first.left_out == ""
    make_run(tmp_path / "runs" / "mine")
    make_run(tmp_path / "runs" / "other")
    assert load_documents(config).train == first.train  # as benchmarks read it
    for output in (tmp_path / "runs" / "mine", tmp_path / "runs" / ".." / "runs" / "mine"):
        resumed = load_documents(config, str(output))
        assert (resumed.train, resumed.validation) == (first.train, first.validation)
        assert resumed.left_out == "run directories: 2"
    (tmp_path / "runs" / "mine" / "config.toml").unlink()  # one that was killed at its start
    assert load_documents(config, str(tmp_path / "runs" / "mine")).train == first.train


def test_an_output_that_is_the_corpus_is_refused(tmp_path):
    write_texts(tmp_path)
    with pytest.raises(HymbaError, match="choose an output of its own"):
        load_documents(DataConfig(path=str(tmp_path)), str(tmp_path / "."))
