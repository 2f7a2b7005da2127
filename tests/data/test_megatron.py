import os
import struct
from itertools import pairwise

import numpy as np
import pytest

from hymba_jax.data import megatron
from hymba_jax.data.megatron import MegatronShard, MegatronWriter
from hymba_jax.errors import HymbaError

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12], [13, 14]]
CODES = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def write(path, sequences, documents, code=8, order=None, gap=0):
    """Megatron's files as its description has them.

    Args:
      order: the sequences in the order in which the token file has them.
      gap: tokens of nobody before each.
    """
    tokens, pointers = b"", [0] * len(sequences)
    for sequence in range(len(sequences)) if order is None else order:
        tokens += np.full(gap, 99, CODES[code]).tobytes()
        pointers[sequence] = len(tokens)
        tokens += np.array(sequences[sequence], CODES[code]).tobytes()
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *pointers)
    index += struct.pack(f"<{len(documents)}q", *documents)
    path.with_suffix(".bin").write_bytes(tokens)
    path.with_suffix(".idx").write_bytes(index)
    return path


def assert_same_stream(shard, sequences, documents):
    """Every range of the shard against the lists that it was written from."""
    stream = [token for sequence in sequences for token in sequence]
    offsets = np.cumsum([0, *map(len, sequences)])
    ends = offsets[np.array(documents)].tolist()
    starts = [start for start, stop in pairwise(ends) if start < stop]
    assert (shard.num_tokens, shard.num_documents) == (len(stream), len(starts))
    for start in range(len(stream) + 1):
        for stop in range(start, len(stream) + 1):
            assert shard.read(start, stop).tolist() == stream[start:stop]
            found = shard.document_starts(start, stop).tolist()
            assert found == [p for p in starts if start <= p < stop], (start, stop)


@pytest.mark.parametrize("code", CODES)
def test_sequences_may_lie_anywhere_and_make_documents_together(tmp_path, code):
    sequences, documents = [[1, 2, 3], [4], [5, 6], [], [7, 8, 9, 10], [11]], [0, 2, 2, 3, 4, 6]
    for number, (order, gap) in enumerate([(None, 0), ([3, 5, 0, 4, 2, 1], 0), (None, 2)]):
        path = write(tmp_path / str(number), sequences, documents, code, order, gap)
        shard = MegatronShard(path)
        shard.check()
        assert_same_stream(shard, sequences, documents)
        assert shard.read(0, 3).dtype == np.dtype(f"u{np.dtype(CODES[code]).itemsize}")


@pytest.mark.parametrize(("vocab_size", "code"), [(1 << 16, 8), ((1 << 16) + 1, 4)])
def test_what_is_written_is_what_the_description_says(tmp_path, vocab_size, code):
    documents = [*DOCUMENTS[:-1], [vocab_size - 1, 0]]
    with MegatronWriter(tmp_path / "new" / "written", vocab_size) as writer:
        for document in documents:
            pieces = np.array_split(np.array(document, np.int64), 2)
            writer.write(piece for piece in pieces)
    sequences = [document for document in documents if document]
    by_hand = write(tmp_path / "by_hand", sequences, [0, 1, 2, 2, 3, 4], code)
    for suffix in (".bin", ".idx"):
        written = (tmp_path / "new" / "written").with_suffix(suffix)
        assert written.read_bytes() == by_hand.with_suffix(suffix).read_bytes()
    assert_same_stream(MegatronShard(written), sequences, [0, 1, 2, 2, 3, 4])


def test_long_documents_are_several_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "_LONGEST_SEQUENCE", 3)
    monkeypatch.setattr(megatron, "_CHUNK", 2)
    with MegatronWriter(tmp_path / "a", 100) as writer:
        for document in DOCUMENTS:
            writer.write([np.array(document, np.uint16)])
    by_hand = write(
        tmp_path / "b", [[5, 6, 7], [8], [9, 10, 11], [12], [13, 14]], [0, 1, 2, 2, 4, 5]
    )
    for suffix in (".bin", ".idx"):
        written = (tmp_path / "a").with_suffix(suffix).read_bytes()
        assert written == by_hand.with_suffix(suffix).read_bytes()


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = write(tmp_path / "a", [[1, 2]], [0, 1])
    before = path.with_suffix(".idx").read_bytes()

    def fail():
        with MegatronWriter(path, 10) as writer:
            writer.write([np.array([3, 4, 5])])
            writer.write([np.array([3]), np.array([10])])

    with pytest.raises(
        HymbaError, match=r"a\.bin: document 1 has token ids from 10 to 10, outside"
    ):
        fail()
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]
    assert path.with_suffix(".idx").read_bytes() == before


def test_no_documents(tmp_path):
    with MegatronWriter(tmp_path / "a", 10):
        pass
    shard = MegatronShard(tmp_path / "a")
    assert (shard.num_tokens, shard.num_documents) == (0, 0)
    assert shard.document_starts(0, 0).tolist() == []


LENGTHS, POINTERS, ENTRIES = 34, 34 + 4 * 3, 34 + 12 * 3
DAMAGES = {
    "no Megatron index": (0, b"X"),
    "version 2": (9, struct.pack("<Q", 2)),
    "dtype number 9": (17, b"\x09"),
    "dtype float32": (17, b"\x07"),
    "4 sequences and 4 entries of documents take 114": (18, struct.pack("<Q", 4)),
    "3 sequences and 0 entries": (26, struct.pack("<Q", 0)),
    "sequence 1 has -1 tokens from byte 6": (LENGTHS + 4, struct.pack("<i", -1)),
    "sequence 2 has 4 tokens from byte 10, which are not in": (LENGTHS + 8, struct.pack("<i", 4)),
    "its sequences take 14 bytes": (LENGTHS + 8, struct.pack("<i", 2)),
    "sequence 0 has 3 tokens from byte -2": (POINTERS, struct.pack("<q", -2)),
    "sequence 1 has 2 tokens from byte 7": (POINTERS + 8, struct.pack("<q", 7)),
    "documents are sequences 1 up to 3": (ENTRIES, struct.pack("<q", 1)),
    "documents are sequences 0 up to 2": (ENTRIES + 24, struct.pack("<q", 2)),
    "documents 0 to 3 are not rising": (ENTRIES + 8, struct.pack("<q", 3)),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_indices_are_one_line(tmp_path, message):
    path = write(tmp_path / "a", [[1, 2, 3], [4, 5], [6, 7, 8]], [0, 1, 2, 3])
    offset, content = DAMAGES[message]
    index = bytearray(path.with_suffix(".idx").read_bytes())
    index[offset : offset + len(content)] = content
    path.with_suffix(".idx").write_bytes(index)
    with pytest.raises(HymbaError, match=message) as caught:
        MegatronShard(path)
    assert str(tmp_path) in str(caught.value)


def test_truncated_and_missing_files(tmp_path):
    path = write(tmp_path / "a", [[1, 2, 3], [4, 5]], [0, 1, 2])
    for suffix, sizes in ((".bin", (0, 5, 8)), (".idx", (0, 20, 33, 34, 60))):
        content = path.with_suffix(suffix).read_bytes()
        for size in sizes:
            path.with_suffix(suffix).write_bytes(content[:size])
            with pytest.raises(HymbaError, match=r"a\.(bin|idx): "):
                MegatronShard(path)
        path.with_suffix(suffix).unlink()
        with pytest.raises(HymbaError, match=rf"a{suffix}: no such file"):
            MegatronShard(path)
        path.with_suffix(suffix).write_bytes(content)


def test_what_samples_miss_the_whole_check_finds(tmp_path, monkeypatch):
    """Of a large index opening reads samples only."""
    monkeypatch.setattr(megatron, "_CHECKED_WHOLE", 1000)
    monkeypatch.setattr(megatron, "_SAMPLE", 4)
    path = write(tmp_path / "a", [[n] for n in range(2000)], range(2001))
    MegatronShard(path).check()
    content = path.with_suffix(".idx").read_bytes()
    for offset, value, message in (
        (34 + 4 * 2000 + 8 * 1010, 1 << 40, "sequence 1010 has 1 tokens from byte 1099511627776"),
        (34 + 4 * 2000 + 8 * 1010, 0, "sequences from 0 on do not follow one another"),
        (34 + 12 * 2000 + 8 * 1010, 0, "documents 0 to 2000 are not rising"),
    ):
        damaged = content[:offset] + struct.pack("<q", value) + content[offset + 8 :]
        path.with_suffix(".idx").write_bytes(damaged)
        with pytest.raises(HymbaError, match=message):
            MegatronShard(path).check()
