import codecs
import gzip
import hashlib
import json
from itertools import product

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hymba_jax.data.documents import BadRecordsError, read_documents
from hymba_jax.data.listing import File, list_files
from hymba_jax.data.records import Document, Problem
from hymba_jax.data.split import document_hash, hold_out_tail
from hymba_jax.data.text_field import TextField
from hymba_jax.errors import HymbaError

ADVICE = 'or set data.on_bad_record to "skip" (--data.on-bad-record skip)'


def lines(*texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write(directory, **contents):
    for name, content in contents.items():
        (directory / name.replace("_", ".")).write_bytes(content)
    return list_files(str(directory)).files


def read(files, **options):
    return [(document.name, document.text) for document in read_documents(files, **options)]


def read_broken(files):
    """The texts before the error, and its lines."""
    texts = []
    with pytest.raises(BadRecordsError) as caught:
        collect(texts, files)
    return texts, str(caught.value).split("\n")


def collect(texts, files):
    for document in read_documents(files):
        texts.append(document.text)  # one by one: those before an error remain


# --- Reading ---


def test_documents_of_many_files_in_order(tmp_path):
    files = write(
        tmp_path,
        b_jsonl=lines("two", "three"),
        a_txt=b"one",
        c_txt_gz=gzip.compress(b"four"),
        d_jsonl=lines(""),
    )
    assert read(files) == [
        ("a.txt", "one"),
        ("b.jsonl:1", "two"),
        ("b.jsonl:2", "three"),
        ("c.txt.gz", "four"),
    ]
    content = b'{"body": "five"}'
    (tmp_path / "d.jsonl").write_bytes(content)
    assert read([File("d.jsonl", str(tmp_path / "d.jsonl"), None)], content=TextField("body")) == [
        ("d.jsonl:1", "five")
    ]


def test_bad_records_of_a_file_are_listed_together(tmp_path):
    bad = b"bad\n\xff\n[]\n"
    files = write(tmp_path, a_txt=b"one", b_jsonl=lines("two") + bad + lines("x"), c_txt=b"\0")
    texts, (first, *others) = read_broken(files)
    assert texts == ["one", "two"]  # nothing after the first bad record
    path = tmp_path / "b.jsonl"
    assert first == f"{path}: 3 problems: fix them, {ADVICE}"
    for number, reason, line in zip((2, 3, 4), ("broken", "not U", "not a"), others, strict=True):
        assert line.startswith(f"  {path}:{number}: {reason}")

    files = write(tmp_path, b_jsonl=lines("two") + b"bad\n" * 100)
    _, listed = read_broken(files)
    assert len(listed) == 22
    assert (listed[0].split(": ")[1], listed[-1]) == ("100 problems", "  and 80 more")

    files = write(tmp_path, b_jsonl=b"{\x1b\n")
    _, (alone,) = read_broken(files)
    assert alone.startswith(f"{path}:1: broken JSON")
    assert alone.endswith(ADVICE)


def test_a_table_without_the_column_is_not_to_be_skipped(tmp_path):
    """As the others would be, too."""
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    _, (line,) = read_broken(list_files(str(tmp_path)).files)
    assert line == (
        f"{tmp_path}/a.parquet: no column 'text' (it has: 'body'): set data.text_field "
        "(--data.text-field)"
    )


def test_bad_records_are_skipped_and_reported(tmp_path):
    random_lines = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() for n in range(2_000)]
    files = write(
        tmp_path,
        a_jsonl=lines("one") + b"bad\n" + lines("two"),
        b_gz=gzip.compress(lines(*random_lines))[:-9],
        c_pdf=b"%PDF-1.4",
        d_jsonl_gz=gzip.compress(lines(*random_lines))[:-500],
        e_txt=b"five",
    )
    problems = []
    documents = read(files, on_bad_record="skip", report=problems.append)
    assert documents[:2] == [("a.jsonl:1", "one"), ("a.jsonl:3", "two")]
    assert documents[-1] == ("e.txt", "five")
    broken = [f"d.jsonl.gz:{number}" for number in range(1, 2_000)]
    assert [name for name, _ in documents[2:-1]] == broken[: len(documents) - 3]
    assert 1_900 < len(documents) < 2_003
    assert [(problem.name, problem.whole_file) for problem in problems] == [
        ("a.jsonl:2", False),
        ("b.gz", True),
        ("c.pdf", True),
        ("d.jsonl.gz", True),
    ]
    assert problems[2] == Problem("c.pdf", "a PDF file, not text: convert it or take it out", True)
    assert read(files, on_bad_record="skip") == documents


@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
def test_empty_records_are_skipped_and_reported(tmp_path, on_bad_record):
    array = json.dumps([{"text": ""}, {"text": "two"}]).encode()
    files = write(
        tmp_path,
        a_jsonl=lines("one", "") + b"\n" + lines(" "),
        b_json=array,
        c_txt=codecs.BOM_UTF8,
        d_txt_gz=gzip.compress(b""),
    )
    problems = []
    documents = read(files, on_bad_record=on_bad_record, report=problems.append)
    assert documents == [("a.jsonl:1", "one"), ("a.jsonl:4", " "), ("b.json:element 2", "two")]
    names = ["a.jsonl:2", "b.json:element 1", "c.txt", "d.txt.gz"]
    assert problems == [Problem(name, "has no text", is_bad=False) for name in names]


def test_a_file_that_cannot_be_read_is_never_skipped(tmp_path):
    write(tmp_path, a_txt=b"one")
    files = [File("a.txt", str(tmp_path / "a.txt"), 3), File("b", str(tmp_path / "b"), 1)]
    for choice in ("stop", "skip"):
        with pytest.raises(HymbaError, match=r"/b: cannot be read \(No such file"):
            read(files, on_bad_record=choice)


# --- The validation split ---


def test_split_is_by_hash_of_the_text():
    texts = [f"text {number} é" for number in range(10_000)]
    before = set()
    for fraction in (0.001, 0.05, 0.3, 0.99):
        held = {text for text in texts if document_hash(text) < fraction * 2**64}
        assert held == {
            text
            for text in texts
            if int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64 < fraction
        }
        assert abs(len(held) / len(texts) - fraction) < 0.015  # three times its deviation
        assert before <= held
        before = held


def test_one_document_holds_out_its_tail_at_a_line_end():
    text = "".join(f"line {number}\n" for number in range(1000))
    for fraction in (0.01, 0.05, 0.5, 0.9):
        (train, held), (validation, also) = hold_out_tail(
            [Document("a", text)], len(text), fraction
        )
        assert (held, also) == (False, True)
        assert train.text + validation.text == text
        assert train.text.endswith("\n")
        assert abs(len(validation.text) - fraction * len(text)) <= 5  # half a line
    assert train.name == validation.name == "a"


def test_sides_of_one_document_are_not_empty():
    fractions = (0.001, 0.2, 0.5, 0.8, 0.999)
    for length, fraction in product(range(2, 7), fractions):
        for letters in product("a\n", repeat=length):
            text = "".join(letters)
            for size in range(1, length + 1):  # of its pieces
                parts = [text[start : start + size] for start in range(0, length, size)]
                pieces = [Document("a", part, True) for part in parts[:-1]]
                pieces.append(Document("a", parts[-1]))
                sides = list(hold_out_tail(pieces, length, fraction))
                assert "".join(piece.text for piece, _ in sides) == text
                held = [side for _, side in sides]
                assert held == sorted(held)
                assert set(held) == {False, True}
                assert all(piece.text for piece, _ in sides)
                # Each side is a document of its own, whose last piece ends it.
                last = (held.index(True) - 1, len(held) - 1)
                assert [not piece.continues for piece, _ in sides] == [
                    index in last for index in range(len(held))
                ]


def test_a_line_end_far_away_does_not_decide():
    text = "short\n" + "x" * 994
    sides = list(hold_out_tail([Document("a", text)], 1000, 0.1))
    assert [len(piece.text) for piece, _ in sides] == [900, 100]
