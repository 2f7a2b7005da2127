import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tracemalloc
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from hymba_jax.data.formats import read_records
from hymba_jax.data.records import BrokenFile, Document, Problem
from hymba_jax.data.text_field import TextField
from hymba_jax.errors import HymbaError

COMPRESS = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


def read(content, name, text_field="text"):
    return list(read_records(io.BytesIO(content), name, TextField(text_field)))


def pairs(content, name, text_field="text"):
    """Names and texts of a file without bad records and long documents; not its empty records."""
    records = read(content, name, text_field)
    documents = [record for record in records if isinstance(record, Document) or record.is_bad]
    assert not any(document.continues for document in documents)
    return [(document.name, document.text) for document in documents]


def read_broken(content, name):
    """The records before a file is found broken, and why it is."""
    records = []
    with pytest.raises(BrokenFile) as caught:
        collect(records, content, name)
    return records, str(caught.value)


def collect(records, content, name):
    for record in read_records(io.BytesIO(content), name, TextField()):
        records.append(record)  # one by one: those before an error remain


def reason_of(content, name):
    return read_broken(content, name)[1]


def lines(*values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def parquet(columns, **options):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


# --- Text ---


def test_any_other_suffix_is_text_as_it_is():
    text = "naïve\r\nδ\rend"
    for name in ("a.txt", "b.MD", "no suffix", "dir.json/x", "c.csv"):
        assert pairs(text.encode(), name) == [(name, text)]
    assert pairs(("\ufeff" + text + "\ufeff").encode(), "a") == [("a", text + "\ufeff")]
    assert pairs(b"", "a.txt") == pairs(b"\xef\xbb\xbf", "a.txt") == []
    # Text whose first letters are those of binary formats.
    for letters in ("MZ", "PAR1 S", "ORC", "BZh9", "BM", "ID3", "PARENT", "GIF89a", "OTTO", "RIFF"):
        assert pairs(letters.encode() + b" is text", "a") == [("a", letters + " is text")]


def test_long_text_is_cut_at_line_ends_within_blocks_of_any_size(monkeypatch):
    monkeypatch.setattr("hymba_jax.data.records.PIECE", 100)
    random.seed(0)
    letters = "aé€\U0001f600\r\n\n"
    for size in (*range(1, 12), 1000):
        monkeypatch.setattr("hymba_jax.data.records.BLOCK", size)
        monkeypatch.setattr("hymba_jax.data.formats.find_compression", lambda _: None)
        for length in (99, 100, 101, 700):
            text = "".join(random.choices(letters, weights=[9, 9, 9, 9, 1, 1, 1], k=length))
            documents = read(text.encode(), "a.txt")
            assert "".join(document.text for document in documents) == text
            assert all(document.name == "a.txt" for document in documents)
            assert [document.continues for document in documents][-1] is False
            assert all(document.continues for document in documents[:-1])
            assert (len(documents) > 1) == (length > 100)
            for document in documents:
                assert 0 < len(document.text) <= 100
                cut_at_line = document.text.endswith("\n") or "\n" not in document.text
                assert cut_at_line or not document.continues


def test_memory_does_not_grow_with_the_file():
    class Endless(io.RawIOBase):
        left = 200 << 20

        def readable(self):
            return True

        def readinto(self, buffer):
            size = min(len(buffer), self.left)
            buffer[:size] = b"lorem ipsum dolor sit amet, con\n"[:1] * size
            self.left -= size
            return size

    tracemalloc.start()
    try:
        file = io.BufferedReader(Endless())
        sizes = [len(document.text) for document in read_records(file, "a", TextField())]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sizes) == 200 << 20
    assert max(sizes) == 1 << 24
    assert peak < 80 << 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"ab\0c", "binary, not text (byte 2 is zero)"),
        ("\ufeffab\0c".encode(), "binary, not text (byte 5 is zero)"),
        ("é".encode("latin-1"), "not UTF-8 text (byte 0)"),
        (b"\xef\xbb\xbfab\xff", "not UTF-8 text (byte 5)"),
        ("cut in a character: é".encode()[:-1], "not UTF-8 text (byte 20)"),
        ("é".encode("utf-16"), "UTF-16 text: convert it (iconv -f UTF-16 -t UTF-8)"),
        ("é".encode("utf-32"), "UTF-32 text"),
        (b"\xfe\xff\0a", "UTF-16 text"),
    ],
)
def test_what_is_not_utf8_is_broken(content, reason):
    for name in ("a.txt", "a.unknown"):
        assert reason_of(content, name).startswith(reason)


def test_what_was_read_of_a_broken_text_ends(monkeypatch):
    monkeypatch.setattr("hymba_jax.data.records.PIECE", 100)
    monkeypatch.setattr("hymba_jax.data.records.BLOCK", 250)
    records, reason = read_broken(b"x" * 600 + b"\0" + b"y" * 99, "a.txt")
    assert "byte 600 is zero" in reason
    assert "".join(record.text for record in records) == "x" * 500
    assert [record.continues for record in records] == [True] * 4 + [False]


# --- Compression ---


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compression_goes_by_content(suffix):
    compress = COMPRESS[suffix]
    content = lines({"text": "one"}, {"text": "two"}, {"text": "é" * 100_000})
    expected = [("a.JSONL:1", "one"), ("a.JSONL:2", "two"), ("a.JSONL:3", "é" * 100_000)]
    several = compress(content[:5]) + compress(b"") + compress(content[5:])
    for packed in (compress(content), several, compress(content) + bytes(64)):
        assert pairs(packed, "a.JSONL") == expected
        named = [(f"a.JSONL.{suffix}:{n}", text) for n, (_, text) in enumerate(expected, 1)]
        assert pairs(packed, f"a.JSONL.{suffix}") == named
    assert pairs(content, f"a.jsonl.{suffix}")[0] == (f"a.jsonl.{suffix}:1", "one")
    assert pairs(compress(b""), "a.txt") == []
    assert "UTF-16" in reason_of(compress(b"\xff\xfea\0"), "a")
    assert "compressed twice" in reason_of(compress(compress(content)), "a")
    assert "compressed twice" in reason_of(compress(parquet({"text": ["a"]})), "a")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_broken_compression(suffix):
    random.seed(1)
    text = random.randbytes(50_000).hex().encode()
    packed = COMPRESS[suffix](text)
    for end in (20, len(packed) // 2, len(packed) - 1):
        assert reason_of(packed[:end], "a").startswith("truncated")
    assert reason_of(packed + b"garbage", "a").startswith("corrupt")
    assert reason_of(packed[:15] + b"\xff" * 99 + packed[15:], "a").startswith("corrupt")


def test_records_before_the_break_remain():
    content = lines(*({"text": str(number)} for number in range(10_000)))
    records, reason = read_broken(gzip.compress(content)[:-500], "a.jsonl")
    assert reason.startswith("truncated gzip")
    assert [record.text for record in records] == list(map(str, range(len(records))))
    assert 5_000 < len(records) < 10_000


def test_a_large_window_and_a_skipped_frame():
    settings = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    frame = stream.compress(b"text") + stream.flush()
    skipped = struct.pack("<II", 0x184D2A50, 3) + b"abc"
    assert pairs(skipped + frame + skipped, "a") == [("a", "text")]


# --- What is no text ---


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"%PDF-1.4\ntext", "a PDF file"),
        (b"\x89PNG\r\n\x1a\n\0\0", "a PNG image"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image"),
        (b"GIF89a\x01\0\x01\0", "a GIF image"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "a WAV recording"),
        (b"ID3\x04\0\0", "an MP3 recording"),
        (b"\0\0\0\x20ftypisom", "an MP4 film"),
        (zipped("[Content_Types].xml", "word/document.xml"), "an Office document"),
        (zipped("model/data.pkl"), "a PyTorch checkpoint"),
        (zipped("a.txt"), "a ZIP archive"),
        (zipped(), "a ZIP archive"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
        (b"\x7fELF\x02\x01", "an ELF program"),
        (b"MZ\x90\0\x03\0", "a Windows program"),
        (b"\xca\xfe\xba\xbe\0\0\0\x41", "a Java class"),
        (b"\0asm\1\0\0\0", "a WebAssembly module"),
        (b"wOF2\0\1\0\0", "a font"),
        (b"SQLite format 3\0\x10\0", "an SQLite database"),
        (b"\x89HDF\r\n\x1a\n\0", "an HDF5 file"),
        (b"\x93NUMPY\1\0", "a NumPy array"),
        (b"\x80\4\x95\x0b\0", "a Python pickle"),
        (struct.pack("<Q", 26) + b'{"a":{"dtype":"F32"}}', "a safetensors checkpoint"),
        (b"GGUF\3\0\0\0", "a GGUF checkpoint"),
        (b"ARROW1\0\0\xff\xff", "an Arrow file"),
        (b"Obj\x01\x04\x16avro.schema", "an Avro file"),
        (b"ORC\n\0\1", "an ORC file"),
    ],
)
def test_binary_formats_are_refused_by_name(content, name):
    for packed in (content, gzip.compress(content)):
        for file in ("a.txt", "a.jsonl", "a"):
            reason = reason_of(packed, file)
            assert reason.startswith(name)
            assert reason.endswith("not text: convert it or take it out")


# --- JSON ---


def test_json_lines():
    texts = ["plain", 'quo"te\n\ttab', "é \U0001f600 \u2028 line separator", "x" * 5000]
    one, two, three, four = (lines({"id": 1, "body": text}) for text in texts)
    content = b"\xef\xbb\xbf" + one + b"\r\n" + two + lines({"body": ""}) + three + four[:-1]
    for name in ("a.jsonl", "a.NDJSON", "a.json"):
        expected = [(f"{name}:{n}", text) for n, text in zip((1, 3, 5, 6), texts, strict=True)]
        assert pairs(content, name, "body") == expected


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"text": "a"', ["broken JSON", "column"]),
        (b"text", ["broken JSON", "column 1", "fix or remove"]),
        (b'{"body": "a", "n": 1}', ["no field 'text'", "'body', 'n'", "(--data.text-field)"]),
        (b"{}", ["no field 'text'", "none"]),
        (b'{"messages": []}', ["no field 'text'", "set data.format to chat"]),
        (b'{"chosen": "a", "rejected": "b"}', ["no field 'text'", "data.format to preference"]),
        (b'["a"]', ["not a JSON object"]),
        (b'{"text": 3}', ["field 'text' is not a string"]),
        (b'{"text": "\xff"}', ["not UTF-8", "byte 10"]),
        (b'{"text": "\\ud800"}', ["surrogate"]),
        (b'{"a":' + b"[" * 100_000, ["unreadable JSON"]),
        (b'{"a":' + b"9" * 5_000 + b"}", ["unreadable JSON"]),
        (b'{"text": "' + b"x" * 100_000 + b'"}', ["longer than 1 GiB", "split it"]),
    ],
)
def test_bad_lines_are_problems_among_documents(line, parts, monkeypatch):
    if parts[0].startswith("longer"):
        monkeypatch.setattr("hymba_jax.data.records.LARGEST_RECORD", 50_000)
        monkeypatch.setattr("hymba_jax.data.records.BLOCK", 20_000)
    for name in ("a.jsonl", "a.json"):
        before, problem, after = read(
            lines({"text": "good"}) + b"\n" + line + b"\n" + lines({"text": "too"}), name
        )
        assert (before, after) == (Document(f"{name}:1", "good"), Document(f"{name}:4", "too"))
        assert isinstance(problem, Problem)
        assert (problem.name, problem.whole_file) == (f"{name}:3", False)
        assert all(part in problem.reason for part in parts)


def test_long_records_are_cut_like_files(monkeypatch):
    monkeypatch.setattr("hymba_jax.data.records.PIECE", 4)
    expected = [("abcd", True), ("e\n", True), ("fgh", False), ("next", False)]
    values = [{"text": "abcde\nfgh"}, {"text": "next"}]
    for content, name in (
        (lines(*values), "a.jsonl"),
        (json.dumps(values).encode(), "a.json"),
        (parquet({"text": [value["text"] for value in values]}), "a"),
    ):
        records = read(content, name)
        assert [(record.text, record.continues) for record in records] == expected
        assert len({record.name for record in records[:3]}) == 1


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [1, 7, 1000, 1 << 20])
def test_json_arrays_are_parsed_element_by_element(indent, block, monkeypatch):
    monkeypatch.setattr("hymba_jax.data.records.BLOCK", block)
    tricky = ['],[{"', "\\", '\\"', "é\U0001f600", "\u2028", "x" * 300, "\0"]
    values = [{"n": [-1.5e3, True, None, {}], "text": text} for text in tricky]
    values[2:2] = [12345, {"text": 7}, None]  # bad ones
    content = b" \n" + json.dumps(values, indent=indent).encode() + b"\n \n"
    if block == 1:  # what a file begins with has to be in one block
        content = content.strip()
    records = read(content, "a.json")
    good = [(r.name, r.text) for r in records if isinstance(r, Document)]
    numbers = (1, 2, 6, 7, 8, 9, 10)
    assert good == [(f"a.json:element {n}", t) for n, t in zip(numbers, tricky, strict=True)]
    bad = [(r.name.rpartition(" ")[2], r.reason[:16]) for r in records if isinstance(r, Problem)]
    assert bad == [("3", "not a JSON objec"), ("4", "field 'text' is "), ("5", "not a JSON objec")]
    assert read(b"[ ]\n", "a.json") == read(b"[]", "a.json") == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "a"}, {"text": ', "in element 2"),
        (b'[{"text": "a"}, {"text": "unfinished', "Unterminated string"),
        (b'[{"text": "a"}', "in element 1"),
        (b"[", "in element 1"),
        (b'[{"text": "a"},]', "in element 2"),
        (b'[{"text": "a"} {"text": "b"}]', "in element 1"),
        (b'[{"text": "a"}, {text: "b"}' + b', {"text": "c"}' * 99 + b"]", "in element 2"),
        (
            b'[{"text": "a"}, {"text" "b"' + b', {"text": "c"}' * 99 + b"]",
            "':' delimiter, in element 2",
        ),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"text": "a"}] {"text": "b"}', "more text after the end"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "not UTF-8 text (byte 26)"),
    ],
)
def test_broken_json_arrays(content, reason):
    assert reason in reason_of(content, "a.json")


def test_an_element_too_large(monkeypatch):
    monkeypatch.setattr("hymba_jax.data.records.LARGEST_RECORD", 5_000)
    monkeypatch.setattr("hymba_jax.data.records.BLOCK", 1_000)
    content = json.dumps([{"text": "a"}, {"text": "x" * 100_000}]).encode()
    assert "element 2 is longer than 1 GiB" in reason_of(content, "a.json")


def test_one_json_object():
    value = {"title": "b", "text": "one\ntext"}
    for indent in (None, 2):
        assert pairs(json.dumps(value, indent=indent).encode(), "a.json") == [
            ("a.json:1", "one\ntext")
        ]
    (problem,) = read(json.dumps(value, indent=2).encode()[:-3], "a.json")
    assert isinstance(problem, Problem)
    assert "broken JSON" in problem.reason
    assert "line 3, column" in problem.reason


def test_a_document_too_large_for_memory_is_refused():
    class Zeros(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = bytes(len(buffer))
            return len(buffer)

    for name in ("a.jsonl", "a.json", "a.txt"):
        with pytest.raises(BrokenFile, match="binary"):
            list(read_records(io.BufferedReader(Zeros()), name, TextField()))


# --- Parquet ---


def test_parquet_row_by_row():
    texts = [f"text {number} é" for number in range(1000)]
    texts[500] = ""
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        columns = {"n": range(1000), "body": pa.array(texts, pa.string()).cast(kind)}
        content = parquet(columns, row_group_size=300, compression="zstd")
        expected = [(f"a.parquet:row {n}", text) for n, text in enumerate(texts, 1) if text]
        assert pairs(content, "a.parquet", "body") == expected
    assert pairs(parquet({"text": ["a"]}), "data.txt") == [("data.txt:row 1", "a")]
    assert read(parquet({"text": pa.array([], pa.string())}), "a.parquet") == []


def test_parquet_is_not_read_a_row_group_at_once():
    class Counting(io.BytesIO):
        read_so_far = 0

        def read(self, size=-1):
            content = super().read(size)
            self.read_so_far += len(content)
            return content

    random.seed(2)
    texts = [random.randbytes(2_000).hex() for _ in range(5_000)]
    content = parquet({"text": texts}, use_dictionary=False)
    assert pq.ParquetFile(io.BytesIO(content)).num_row_groups == 1
    assert len(content) > 16 << 20
    file = Counting(content)
    assert next(read_records(file, "a", TextField())).text == texts[0]
    assert file.read_so_far < len(content) // 2


def test_bad_rows_are_problems_among_documents():
    not_utf8 = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"a\xff")]
    )
    column = pa.chunked_array([["a", None], not_utf8, ["b"]])
    first, null, broken, last = read(parquet({"text": column}), "a")
    assert (first.text, last.text, last.name) == ("a", "b", "a:row 4")
    assert (null.name, null.reason[:4]) == ("a:row 2", "null")
    assert (broken.name, broken.reason[:19]) == ("a:row 3", "not UTF-8 text (byt")


def test_broken_parquet(monkeypatch):
    content = parquet({"body": ["a" * 1000], "n": [1], "list": [["a"]], "bytes": [b"a"]})
    assert "no column 'text' (it has: 'body', 'n', 'list', 'bytes')" in reason_of(content, "a")
    for column, kind in (("n", "int64"), ("bytes", "binary"), ("list", "list<")):
        with pytest.raises(BrokenFile, match=f"column '{column}' is {kind}.*, not string"):
            read(content, "a", column)
    good = parquet({"text": ["a" * 1000]}, compression="none", use_dictionary=False)
    for broken in (good[:-20], good[:4], good[:10] + b"\xff" * 20 + good[30:]):
        assert "broken Parquet (" in reason_of(broken, "a.parquet")
    assert "not a Parquet file" in reason_of(b"text", "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(HymbaError, match=r"pip install 'hymba_jax\[parquet\]'"):
        read(good, "a.parquet")
