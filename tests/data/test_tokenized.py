"""A tokenized corpus is what its manifest says, to the byte, or an error that names the file."""

import json
import random
import shutil
import zlib

import numpy as np
import pytest

from hymba_jax.data import tokenize_command, tokenize_records
from hymba_jax.data.show_examples import examples
from hymba_jax.data.token_store import TokenStore
from hymba_jax.data.tokenize_command import TokenizeConfig, TokenizeDataConfig
from hymba_jax.data.tokenized import TokenizedCorpus, damage
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import build_tokenizer

BLOCK = 65536


def tokenize(directory, name="out", **options):
    data = TokenizeDataConfig(str(directory / "corpus"), validation_fraction=0.4)
    options = {"tokenizer": "bytes", "workers": 1} | options
    tokenize_command.main(TokenizeConfig(str(directory / name), data, **options))
    return directory / name


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """A corpus whose training shard has more than three blocks."""
    directory = tmp_path_factory.mktemp("tokenized")
    (directory / "corpus").mkdir()
    for number in range(8):
        text = "".join(random.Random(number).choices("abcdé \n", k=20_000))
        (directory / "corpus" / f"{number}.txt").write_text(text)
    return tokenize(directory)


@pytest.fixture
def copy(tokenized, tmp_path):
    shutil.copytree(tokenized, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path, byte):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << (byte % 8)
    path.write_bytes(content)


def test_streams_and_counts(tokenized):
    corpus = TokenizedCorpus.open(tokenized)
    manifest = json.loads((tokenized / "manifest.json").read_text())
    for side in ("train", "validation"):
        store, about = getattr(corpus, side), manifest[side]
        tokens = np.fromfile(tokenized / f"{side}-00000-000.bin", "<u2")
        assert (store.num_tokens, store.num_documents) == (len(tokens), about["documents"])
        for start, stop in ((0, len(tokens)), (32_767, 32_770), (5, 5), (len(tokens) - 1,) * 2):
            np.testing.assert_array_equal(store.read(start, stop), tokens[start:stop])
        starts = np.flatnonzero(tokens == corpus.tokenizer.bos_id)
        np.testing.assert_array_equal(store.document_starts(0, len(tokens)), starts)
        assert getattr(corpus.manifest, side).text_bytes == about["text_bytes"]
    sizes = [path.stat().st_size for path in (tokenized.parent / "corpus").iterdir()]
    assert sum(manifest[side]["text_bytes"] for side in ("train", "validation")) == sum(sizes)
    assert list(damage(tokenized)) == []


def test_showing_the_first_documents_does_not_look_for_all(tokenized, monkeypatch):
    corpus, find, stops = TokenizedCorpus.open(tokenized), TokenStore.document_starts, []
    _, second, third = find(corpus.train, 0, corpus.train.num_tokens)[:3]

    def record(store, start, stop):
        stops.append(stop)
        return find(store, start, stop)

    monkeypatch.setattr(TokenStore, "document_starts", record)
    example = [*examples(corpus, 2)][-1].plain
    assert example.startswith(f"--- train 2: {third - second:,} tokens")
    assert max(stops) < corpus.train.num_tokens


def test_checksums_are_the_crc_of_each_block(tokenized):
    for path in tokenized.glob("*.bin"):
        content = path.read_bytes()
        blocks = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
        expected = "".join(f"{zlib.crc32(block):08x}\n" for block in blocks)
        assert path.with_name(f"{path.name}.crc").read_text() == expected
        assert len(blocks) > 1


def test_a_flipped_bit_is_found_when_its_block_is_read(copy):
    path = copy / "train-00000-000.bin"
    num_blocks = -(-path.stat().st_size // BLOCK)
    for block in (0, 1, num_blocks - 1):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, path.stat().st_size)
        byte = random.Random(block).randrange(start, stop)
        flip(path, byte)
        store = TokenizedCorpus.open(copy).train  # opening reads no tokens
        for other in set(range(num_blocks)) - {block}:
            store.read(other * BLOCK // 2, other * BLOCK // 2 + 2)
        for _ in range(2):
            with pytest.raises(HymbaError, match=rf"{path}: damaged in block {block}, ") as caught:
                store.read(byte // 2, byte // 2 + 1)
        assert list(damage(copy)) == [str(caught.value)]
        flip(path, byte)


@pytest.mark.parametrize("name", ["train-00000-000.idx", "validation-00000-000.bin.crc"])
def test_a_flipped_bit_beside_the_tokens(copy, name):
    flip(copy / name, 15)
    with pytest.raises(HymbaError, match=rf"{name}: damaged"):
        TokenizedCorpus.open(copy).validation.read(0, 1)
    assert name in next(damage(copy))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".bin.crc"])
def test_truncated_and_missing_files(copy, suffix):
    path = copy / f"validation-00000-000{suffix}"
    content = path.read_bytes()
    for kept in (content[:-2], content + b"\0\0"):
        path.write_bytes(kept)
        with pytest.raises(HymbaError, match=rf"{path}: {len(kept)} bytes, but the manifest says "):
            TokenizedCorpus.open(copy)
    path.unlink()
    with pytest.raises(HymbaError, match=rf"{path}: no such file"):
        TokenizedCorpus.open(copy)


def test_another_tokenizer(copy):
    build_tokenizer("bpe:300", ["the the the"]).save(copy)
    with pytest.raises(HymbaError, match=r"copy: its tokenizer\.json .* is not what made its tok"):
        TokenizedCorpus.open(copy)


def test_what_is_no_tokenized_corpus(tokenized, tmp_path, monkeypatch):
    with pytest.raises(HymbaError, match="no tokenized corpus: it has no manifest"):
        TokenizedCorpus.open(tmp_path)
    for content, message in (
        ('{"version": 2}', "version 2 of the format"),
        ('{"version": 1}', "no manifest of a tokenized corpus"),
        ('{"version": 1, "sources": 3}', "no manifest of a tokenized corpus"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(HymbaError, match=rf"manifest\.json: {message}"):
            TokenizedCorpus.open(tmp_path)

    monkeypatch.setattr(tokenize_records, "UNIT_BYTES", 50_000)
    (tmp_path / "corpus").symlink_to(tokenized.parent / "corpus")
    tokenize(tmp_path, part="2/2")
    with pytest.raises(HymbaError, match="not finished: 2 of 4 groups of files are done: run the"):
        TokenizedCorpus.open(tmp_path / "out")


def test_the_digest_tells_corpora_apart(tokenized, tmp_path):
    shutil.copytree(tokenized.parent / "corpus", tmp_path / "corpus")
    path = tmp_path / "corpus" / "0.txt"
    path.write_text(path.read_text().swapcase())  # the same sizes
    digests = [TokenizedCorpus.open(path).digest for path in (tokenized, tokenize(tmp_path))]
    assert len(set(digests)) == 2
