import numpy as np

from hymba_jax.data.packing import Windows, pack
from hymba_jax.data.records import Document
from hymba_jax.data.token_store import ArrayShard, TokenStore
from hymba_jax.data.tokenizer import build_tokenizer

BYTES = build_tokenizer("bytes", [])


def test_documents_are_between_special_tokens():
    texts = ["one", "δύο", "x" * 3_000_000, "", "four"]  # the third is larger than a slice
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    seen = []
    tokenized = pack(documents, BYTES, lambda done, total: seen.append((done, total)))
    for text, tokens in zip(texts, tokenized, strict=True):
        assert tokens.dtype == np.uint16
        assert tokens[0] == 1
        assert tokens[-1] == 2
        assert BYTES.decode(tokens[1:-1].tolist()) == text
    assert seen == [(3_000_006, 3_000_010), (3_000_010, 3_000_010)]


def test_large_vocabularies_take_32_bits(monkeypatch):
    for size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        monkeypatch.setattr(BYTES, "vocab_size", size)
        assert pack([Document("a", "a")], BYTES)[0].dtype == dtype


def test_windows_predict_each_token_once():
    tokens = np.arange(100, 143, dtype=np.uint16)
    windows = Windows(TokenStore([ArrayShard("numbers", tokens)]), 10)
    assert len(windows) == 4
    records = [windows[index] for index in range(4)]
    assert np.concatenate([record.inputs for record in records]).tolist() == [*range(100, 140)]
    assert np.concatenate([record.targets for record in records]).tolist() == [*range(101, 141)]
    assert records[0].inputs.dtype == np.int32


def test_a_window_needs_one_token_more_than_its_length():
    for count, expected in ((10, 0), (11, 1), (20, 1), (21, 2)):
        store = TokenStore([ArrayShard("zeros", np.zeros(count, np.uint16))])
        assert len(Windows(store, 10)) == expected
