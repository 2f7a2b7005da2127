import json
import threading
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from hymba_jax import cli
from hymba_jax.data import (
    IGNORED_TARGET,
    DataConfig,
    Tokenizer,
    prepare,
    train_iterator,
    validation_batches,
)
from hymba_jax.data.packing import Windows
from hymba_jax.data.sources import is_held_out, load_documents
from hymba_jax.data.token_store import ArrayShard, TokenStore
from hymba_jax.data.tokenizer import build_tokenizer
from hymba_jax.errors import HymbaError

TOKENS = np.arange(1000, 1000 + 37 * 8 + 5, dtype=np.uint16)  # 37 windows of 8, and 4 targets over
STORE = TokenStore([ArrayShard("numbers", TOKENS)])
WINDOWS = Windows(STORE, 8)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"document {number}: {'δ' * number}"}) for number in range(60)]
    path.write_text("\n".join(lines))
    return path


def starts(batch):
    """Windows of TOKENS in a batch, by index."""
    index, rest = np.divmod(batch.inputs[:, 0] - 1000, 8)
    assert not rest.any()
    return index.tolist()


def test_prepare_packs_both_sides_in_order(corpus):
    config = DataConfig(
        path=str(corpus), tokenizer="bytes", sequence_length=16, validation_fraction=0.2
    )
    seen = []
    data = prepare(config, on_progress=lambda done, total: seen.append((done, total)))

    documents = load_documents(config)
    for side, stream in ((documents.train, data.train), (documents.validation, data.validation)):
        expected = []
        for document in side:
            expected += [1, *data.tokenizer.encode(document.text), 2]
        assert stream.read(0, stream.num_tokens).tolist() == expected
    text = "".join(document.text for document in documents.validation)
    assert data.validation_bytes == len(text.encode())
    assert data.validation_targets == len(text.encode()) + 2 * len(documents.validation) - 1
    done, total = seen[-1]
    assert done == total == sum(len(d.text) for d in documents.train + documents.validation)


def test_bits_per_byte_of_a_uniform_guess(corpus):
    config = DataConfig(
        path=str(corpus), tokenizer="bytes", sequence_length=16, validation_fraction=0.2
    )
    data = prepare(config)
    bits = data.validation_targets * np.log2(259)
    assert data.bits_per_byte(np.log(259)) == pytest.approx(bits / data.validation_bytes, rel=1e-12)


def test_bpe_sees_training_documents_only(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("common words " * 20)
    config = DataConfig(
        path=str(tmp_path), tokenizer="bpe:500", sequence_length=16, validation_fraction=0.25
    )
    for document in load_documents(config).validation:
        (tmp_path / document.name).write_text("zzzzzzzz " * 50)
    tokenizer = prepare(config).tokenizer
    assert len(tokenizer.encode("common words ")) <= 3
    assert len(tokenizer.encode("zzzzzzzz")) == 8


def test_given_tokenizer_is_used(corpus, tmp_path):
    config = DataConfig(path=str(corpus), tokenizer="bpe:300", sequence_length=16)
    first = prepare(config)
    first.tokenizer.save(tmp_path / "run")
    again = prepare(
        DataConfig(path=str(corpus), tokenizer="bpe:400", sequence_length=16),
        tokenizer=Tokenizer.load(tmp_path / "run"),
    )
    assert again.train_digest == first.train_digest


def test_digests_tell_corpora_apart(corpus):
    """Of the tokens of either side, and the bytes of the validation text."""
    config = DataConfig(str(corpus), tokenizer="bytes", sequence_length=16)
    data, again = prepare(config), prepare(config)
    assert digests(again) == digests(data)
    lines = corpus.read_text().splitlines()
    held = [is_held_out(f"corpus.jsonl:{i + 1}", config.validation_fraction) for i in range(60)]
    for side in (False, True):
        changed = lines.copy()
        changed[held.index(side)] = json.dumps({"text": "something else"})
        corpus.write_text("\n".join(changed))
        other = digests(prepare(config))
        assert [a != b for a, b in zip(other, digests(data), strict=True)] == [
            False,
            not side,
            side,
        ]


def digests(data):
    return data.tokenizer.fingerprint, data.train_digest, data.validation_digest


def tokenize(corpus, output, fraction):
    options = ("--data.path", corpus, "--data.validation-fraction", fraction)
    options += ("--tokenizer", "bytes", "--output", output)
    cli.main(["tokenize", *map(str, options)])
    return output


@pytest.fixture
def tokenized(corpus, tmp_path):
    return tokenize(corpus, tmp_path / "tokens", 0.2)


def test_a_tokenized_corpus_is_opened_as_it_is(corpus, tokenized):
    data = prepare(DataConfig(path=str(tokenized), sequence_length=16))
    texts = [f"document {number}: {'δ' * number}" for number in range(60)]
    tokens = {(1, *data.tokenizer.encode(text), 2) for text in texts}
    documents = []
    for store in (data.train, data.validation):
        starts = [*store.document_starts(0, store.num_tokens).tolist(), store.num_tokens]
        documents += [tuple(store.read(a, b).tolist()) for a, b in pairwise(starts)]
    assert len(documents) == 60
    assert set(documents) == tokens
    assert data.validation_bytes + 2 * data.validation.num_documents == data.validation.num_tokens
    (note,) = data.notes
    assert note.startswith(f"{tokenized}: is tokenized: its tokenizer")
    same = DataConfig(path=str(tokenized), tokenizer=str(tokenized), sequence_length=16)
    assert digests(prepare(same)) == digests(data)


def test_a_tokenized_corpus_of_another_tokenizer_is_refused(corpus, tokenized):
    config = DataConfig(path=str(tokenized), sequence_length=16)
    with pytest.raises(HymbaError, match="was tokenized by another tokenizer than the run's"):
        prepare(config, tokenizer=build_tokenizer("bpe:270", ["a b a b"]))


def test_a_tokenized_corpus_without_validation_is_refused(corpus, tmp_path):
    tokens = tokenize(corpus, tmp_path / "tokens", 0)
    with pytest.raises(HymbaError, match="has no validation documents: tokenize it with another"):
        prepare(DataConfig(path=str(tokens), sequence_length=16))


@pytest.mark.parametrize("is_tokenized", [False, True])
def test_packed_documents_come_once_an_epoch(corpus, tokenized, is_tokenized):
    """Each piece in a segment of its own, and every token but a document's first a target."""
    path = tokenized if is_tokenized else corpus
    config = DataConfig(str(path), tokenizer="bytes", sequence_length=32, packing="documents")
    data = prepare(config)
    rows = data.train_rows(config)
    batches = islice(train_iterator(rows, 1, seed=0), len(rows))
    found = Counter()
    for batch in batches:
        inputs, targets, segments = (field[0] for field in batch)
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            assert (targets[own] != IGNORED_TARGET).all()
            np.testing.assert_array_equal(inputs[own][1:], targets[own][:-1])
            found.update(targets[own].tolist())
        assert (targets[segments == 0] == IGNORED_TARGET).all()
    tokens = data.train.read(0, data.train.num_tokens).tolist()
    assert found == Counter(token for token in tokens if token != data.tokenizer.bos_id)


def test_too_little_text(corpus):
    with pytest.raises(HymbaError) as caught:
        prepare(DataConfig(path=str(corpus), tokenizer="bytes", sequence_length=100_000))
    for part in (str(corpus), "too little text", "takes 100001", "shorten sequence_length"):
        assert part in str(caught.value)


def test_batches_are_windows_of_the_stream():
    for batch in islice(train_iterator(WINDOWS, 5, seed=0), 20):
        assert batch.inputs.shape == batch.targets.shape == (5, 8)
        assert batch.inputs.dtype == batch.targets.dtype == np.int32
        for row, index in enumerate(starts(batch)):
            window = TOKENS[index * 8 : index * 8 + 9]
            np.testing.assert_array_equal(batch.inputs[row], window[:-1])
            np.testing.assert_array_equal(batch.targets[row], window[1:])


def test_every_window_comes_once_an_epoch_in_a_new_order():
    batches = islice(train_iterator(WINDOWS, 5, seed=3), 3 * 37)
    order = [index for batch in batches for index in starts(batch)]
    epochs = [order[start : start + 37] for start in range(0, len(order), 37)]
    assert len(epochs) == 15
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
        assert epoch != sorted(epoch)
    assert len(set(map(tuple, epochs))) == 15


def test_order_depends_on_the_seed_alone():
    def order(seed):
        return [starts(batch) for batch in islice(train_iterator(WINDOWS, 5, seed), 8)]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("step", [0, 1, 7, 8, 23])
def test_resume_is_exact(step):
    through = train_iterator(WINDOWS, 5, seed=4)
    for _ in range(step):
        next(through)
    state = json.dumps(through.get_state())
    expected = [next(through) for _ in range(12)]

    resumed = train_iterator(WINDOWS, 5, seed=4)
    next(resumed)  # restored into an iterator that was in use
    resumed.set_state(json.loads(state))
    for wanted in expected:
        batch = next(resumed)
        np.testing.assert_array_equal(batch.inputs, wanted.inputs)
        np.testing.assert_array_equal(batch.targets, wanted.targets)
    assert len(state) < 100


def test_order_of_windows_does_not_depend_on_the_batch_size():
    small = [i for b in islice(train_iterator(WINDOWS, 2, seed=5), 12) for i in starts(b)]
    large = [i for b in islice(train_iterator(WINDOWS, 6, seed=5), 4) for i in starts(b)]
    assert small == large


def test_batch_larger_than_the_stream_wraps_around():
    batch = next(
        train_iterator(Windows(TokenStore([ArrayShard("nine", TOKENS[:9])]), 8), 3, seed=0)
    )
    assert starts(batch) == [0, 0, 0]


def test_no_threads_are_left():
    before = threading.active_count()
    iterator = train_iterator(WINDOWS, 5, seed=0)
    next(iterator)
    assert threading.active_count() == before


@pytest.mark.parametrize("batch_size", [1, 4, 19, 50])
def test_validation_covers_every_target_once(batch_size):
    batches = list(validation_batches(STORE, 8, batch_size))
    assert len(batches) == -(-38 // batch_size)
    assert all(batch.targets.shape == (batch_size, 8) for batch in batches)
    inputs = np.concatenate([batch.inputs.ravel() for batch in batches])
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    counted = targets != IGNORED_TARGET
    assert targets[counted].tolist() == TOKENS[1:].tolist()
    assert inputs[counted].tolist() == TOKENS[:-1].tolist()
    assert not inputs[~counted].any()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 20])
def test_validation_limit_spreads_evenly_whatever_the_batch_size(batch_size):
    batches = list(validation_batches(STORE, 8, batch_size, limit=8))
    targets = np.concatenate([batch.targets for batch in batches])
    targets = targets[(targets != IGNORED_TARGET).any(axis=1)]
    assert ((targets[:, 0] - 1001) // 8).tolist() == [0, 4, 9, 14, 19, 23, 28, 33]
    again = validation_batches(STORE, 8, batch_size, limit=8)
    for batch, same in zip(batches, again, strict=True):
        np.testing.assert_array_equal(batch.targets, same.targets)


def test_validation_limit_beyond_the_stream_changes_nothing():
    for batch, same in zip(
        validation_batches(STORE, 8, 4), validation_batches(STORE, 8, 4, limit=40), strict=True
    ):
        np.testing.assert_array_equal(batch.targets, same.targets)
