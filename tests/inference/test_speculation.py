"""Drafted tokens: a sequence has the tokens that it has without them, and is not slower."""

import numpy as np
import pytest
from inference.models import byte_tokenizer, make_model

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.inference import LanguageModel
from hymba_jax.inference.batch_state import NO_TOKEN, Request
from hymba_jax.inference.engine import MAX_DRAFT
from hymba_jax.inference.language_model import collect
from hymba_jax.inference.prompt_lookup import (
    MAX_LOSS,
    NGRAM,
    VERIFICATION_STEPS,
    PromptLookup,
)

NEW = 80
# Log-probabilities of one text, in matmuls of one token and of several, in float32.
TOLERANCE = 1e-4
SAMPLINGS = (
    SamplingConfig(max_new_tokens=NEW),
    SamplingConfig(
        max_new_tokens=NEW,
        temperature=0.9,
        top_k=50,
        seed=3,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
    ),
)


@pytest.fixture(scope="module")
def model():
    return LanguageModel(make_model(), byte_tokenizer(), context=256)


def begin(model, prompt, sampling):
    """One row with its first token."""
    engine = model.engine
    request = Request(prompt, sampling, 0, sampling.max_new_tokens)
    return engine.insert(engine.prefill([prompt], 256), [request])


def values(sampled):
    """The tokens that were sampled, and their log-probabilities."""
    tokens, log_probs = (np.asarray(a)[0] for a in sampled[:2])
    return tokens[tokens != NO_TOKEN].tolist(), log_probs[tokens != NO_TOKEN].tolist()


def alone(model, prompt, sampling):
    """Token by token."""
    state, sampled = begin(model, prompt, sampling)
    tokens, log_probs = values(sampled)
    while not np.asarray(state.stopped)[0]:
        state, sampled = model.engine.decode(state)
        tokens += values(sampled)[0]
        log_probs += values(sampled)[1]
    assert len(tokens) == NEW  # several windows long
    return tokens, log_probs


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_drafts_change_nothing(model, sampling):
    """With drafts that are right up to a random place: what is accepted ends there."""
    prompt, rng = byte_tokenizer().encode("the old dog"), np.random.default_rng(0)
    expected, expected_log_probs = alone(model, prompt, sampling)
    state, sampled = begin(model, prompt, sampling)
    tokens, log_probs = values(sampled)
    while len(tokens) < NEW:
        draft = expected[len(tokens) : len(tokens) + int(rng.integers(1, MAX_DRAFT + 1))]
        right = int(rng.integers(0, len(draft) + 1))
        if right < len(draft):
            draft[right] = (draft[right] + 1) % 256
        state, sampled = model.engine.verify(state, draft)
        new, new_log_probs = values(sampled)
        assert len(new) == min(right + 1, NEW - len(tokens))
        tokens += new
        log_probs += new_log_probs
        if rng.random() < 0.3 and len(tokens) < NEW:
            state, sampled = model.engine.decode(state, 1)
            tokens += values(sampled)[0]
            log_probs += values(sampled)[1]
    assert tokens == expected
    np.testing.assert_allclose(log_probs, expected_log_probs, rtol=0, atol=TOLERANCE)
    assert np.asarray(state.stopped).all()


class Oracle(PromptLookup):
    """Drafts what comes next, and a wrong token behind it."""

    tokens: list[int]

    def draft(self, limit):
        at = len(self._tokens) - self.begins
        return [*self.tokens[at : at + limit - 1][:6], 0][:limit]

    def __init__(self, prompt):
        super().__init__(prompt)
        self.begins = len(prompt)


@pytest.mark.parametrize("interval", [1, 16])
@pytest.mark.parametrize("stop", [False, True])
def test_deltas_are_those_without_drafts(model, monkeypatch, interval, stop):
    """To the end, or to a stop string, which may be inside of a draft."""
    options = {"max_new_tokens": 100, "stream_interval": interval}
    (whole,) = model.generate("the old dog", max_new_tokens=100)
    options |= {"stop": whole.text[40:43]} if stop else {}
    expected = collect(model.stream("the old dog", **options))
    verified, verify = [], model.engine.verify
    monkeypatch.setattr(model, "speculate", True)
    monkeypatch.setattr(model.engine, "verify", lambda *a: verified.append(a) or verify(*a))
    monkeypatch.setattr(Oracle, "tokens", whole.tokens, raising=False)
    monkeypatch.setattr("hymba_jax.inference.language_model.PromptLookup", Oracle)
    (actual,) = collect(model.stream("the old dog", **options))
    assert 0 < len(verified) < len(actual.tokens) / 3
    (wanted,) = expected
    np.testing.assert_allclose(actual.log_probs, wanted.log_probs, rtol=0, atol=TOLERANCE)
    actual.log_probs = wanted.log_probs
    assert actual == wanted


def test_turns_of_a_conversation_are_prefilled_once(model, monkeypatch):
    """But for less than a chunk; what is said is the same, to the bit."""
    kept = LanguageModel(make_model(), byte_tokenizer(), context=256, max_chunk=32, prefix_states=2)
    cold = LanguageModel(make_model(), byte_tokenizer(), context=256, max_chunk=32)
    prefilled, prefill = [], kept.engine.prefill_chunk

    def counted(state, chunk, **options):
        prefilled.append(int(chunk.lengths.sum()))
        return prefill(state, chunk, **options)

    monkeypatch.setattr(kept.engine, "prefill_chunk", counted)
    conversation, said = "s" * 40, ""
    for turn in ("who is there?", "and who else?", "nobody", "then good bye"):
        conversation += said + turn
        prefilled.clear()
        ((answer,), (wanted,)) = (
            each.generate(conversation, max_new_tokens=10) for each in (kept, cold)
        )
        assert answer == wanted
        if said:
            assert sum(prefilled) < len(byte_tokenizer().encode(said + turn)) + 32
        said = answer.text


class TestPromptLookup:
    def test_what_followed_the_same_tokens(self):
        lookup = PromptLookup([1, 2, 3, 4, 5, 9, 1, 2, 3])
        assert lookup.draft(4) == [4, 5, 9, 1]
        lookup.decoded([4])
        assert lookup.draft(2) == [5, 9]
        lookup.decoded([7])  # 3 4 7 is new
        assert lookup.draft(2) == []
        lookup.decoded([1, 2, 3])  # the latest place counts
        assert lookup.draft(3) == [4, 7, 1]

    def test_a_draft_goes_on_where_it_began(self):
        assert PromptLookup([8, 1, 2] * 3).draft(8) == [8, 1, 2, 8, 1, 2, 8, 1]

    def test_it_is_switched_off_where_it_does_not_pay(self):
        """Every draft is wrong: all verifications together cost a twentieth of the steps."""
        lookup, steps, cost = PromptLookup([1] * NGRAM * 2), 0, 0.0
        while steps < 5000:
            if lookup.draft(8):
                cost += VERIFICATION_STEPS - 1
                lookup.verified([1])
            else:
                lookup.decoded([1])
            steps += 1
        assert VERIFICATION_STEPS < cost <= MAX_LOSS * steps + VERIFICATION_STEPS
