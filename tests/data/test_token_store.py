import numpy as np
import pytest

from hymba_jax.data.megatron import MegatronWriter
from hymba_jax.data.token_store import open_tokens
from hymba_jax.errors import HymbaError

EOS = 2


@pytest.fixture
def shards(tmp_path):
    """Shards of every layout, their paths; the documents in them, each with its EOS token."""
    documents = [[5, EOS], [6, 7, 70_000, EOS], [EOS], [8, 9, 10, EOS], [11, EOS], [12, 13]]
    with MegatronWriter(tmp_path / "a", 1 << 17) as writer:
        for document in documents:
            writer.write([np.array(document)])
    stream = [token % (1 << 16) for document in documents for token in document]
    np.array(stream, "<u2").tofile(tmp_path / "b.bin")
    np.save(tmp_path / "c.npy", np.array(stream, np.int32))
    (tmp_path / "d.bin").touch()
    small = [[token % (1 << 16) for token in document] for document in documents]
    paths = [tmp_path / name for name in ("a.idx", "b.bin", "d.bin", "c.npy")]
    return paths, [*documents, *small, *small]


def test_shards_are_one_stream(shards):
    paths, documents = shards
    store = open_tokens(paths, "uint16", EOS)
    stream = [token for document in documents for token in document]
    starts = np.cumsum([0, *map(len, documents)])[:-1].tolist()
    assert store.num_tokens == len(stream)
    assert store.num_documents is None
    for start in range(len(stream) + 1):
        for stop in range(start, len(stream) + 1):
            read = store.read(start, stop)
            assert read.tolist() == stream[start:stop]
            assert read.dtype.kind == "u"
            found = store.document_starts(start, stop)
            assert found.tolist() == [p for p in starts if start <= p < stop], (start, stop)
    for start, stop in ((-1, 2), (3, 2), (0, len(stream) + 1)):
        with pytest.raises(IndexError, match=f"of {len(stream)}"):
            store.read(start, stop)


@pytest.mark.parametrize("dtype", [">u2", ">u4", ">i4"])
def test_the_other_byte_order(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array([1, 500, EOS, 7], dtype))
    store = open_tokens([tmp_path / "a.npy"], eos_id=EOS)
    assert store.read(0, 4).tolist() == [1, 500, EOS, 7]
    assert store.read(0, 4).dtype.isnative
    assert store.document_starts(0, 4).tolist() == [0, 3]


def test_documents_that_are_told_apart(shards):
    (megatron, flat, *_), _ = shards
    assert open_tokens([megatron, megatron.with_suffix("")]).num_documents == 12
    store = open_tokens([flat], "uint16")
    assert store.read(0, 2).tolist() == [5, EOS]
    with pytest.raises(HymbaError, match=r"b\.bin: .* give its eos_id"):
        store.document_starts(0, 2)


def test_files_that_are_none(tmp_path):
    np.save(tmp_path / "wide.npy", np.zeros((2, 2), np.uint16))
    np.save(tmp_path / "float.npy", np.zeros(2))
    np.savez(tmp_path / "archive.npz", np.zeros(2, np.uint16))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "short.npy", np.zeros(100, np.uint16))
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-9])
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "empty.bin").touch()
    (tmp_path / "directory.bin").mkdir()
    for name, dtype, message in (
        ("wide.npy", None, r"uint16 of shape \(2, 2\)"),
        ("float.npy", None, r"float64 of shape \(2,\)"),
        ("archive.npy", None, "not a .npy file, or truncated"),
        ("broken.npy", None, "not a .npy file, or truncated"),
        ("short.npy", None, "not a .npy file, or truncated"),
        ("odd.bin", "uint16", "3 bytes are no whole number of uint16 tokens"),
        ("odd.bin", None, "no dtype is given: .* uint16 or uint32"),
        ("odd.bin", "int32", "dtype 'int32' is not read"),
        ("empty.bin", "uint32", "no tokens"),
        ("directory.bin", "uint32", "is a directory"),
        ("missing.bin", "uint16", "no such file"),
        ("missing.npy", None, "no such file"),
        ("missing", None, "missing.idx: no such file"),
    ):
        with pytest.raises(HymbaError, match=message) as caught:
            open_tokens([tmp_path / name], dtype)
        assert name in str(caught.value)
    with pytest.raises(HymbaError, match="no shards"):
        open_tokens([])
