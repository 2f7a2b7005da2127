"""The decoder against the released code's full forward at every step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import GOLDEN, load

from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.decoding import generate, pick
from hymba_jax.model import Hymba

DECODE_CASES = ("tiny-ntk-decode", "tiny-ntk-decode-short", "tiny-shared-decode")
SMALL = HymbaConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=32,
    layers="W",
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, window=8, rope_type="default"),
    num_meta_tokens=2,
    max_positions=64,
)


@pytest.fixture(scope="module")
def small():
    return Hymba(SMALL, ComputeConfig(), nnx.Rngs(0))


@pytest.mark.parametrize("case", [*DECODE_CASES, "tiny-default-rope-decode", "tiny-nometa-decode"])
def test_greedy_equals_the_released_full_forward(case):
    folder = GOLDEN / case
    meta = json.loads((folder / "meta.json").read_text())
    arrays = np.load(folder / "golden.npz")
    golden = load((folder / meta["weights"]).resolve().name)
    graph, params = golden.model()
    # The released run did not stop at its end-of-sequence token.
    model = nnx.merge(graph, params)
    model.config = dataclasses.replace(golden.config, eos_token_id=0)
    new = list(generate(model, arrays["prompt"][0].tolist(), meta["new_tokens"]))
    assert new == arrays["full_tokens"][0].tolist()


def test_stops_before_the_end_of_sequence_token(small):
    prompt = [5, 9, 3]
    free = list(generate(small, prompt, 12, temperature=1.0, seed=1))
    graph, params = nnx.split(small)
    stopping = nnx.merge(graph, params)
    stopping.config = dataclasses.replace(SMALL, eos_token_id=free[4])
    stopped = list(generate(stopping, prompt, 12, temperature=1.0, seed=1))
    assert stopped == free[: free.index(free[4])]


def test_dynamic_rope_follows_the_text_and_not_its_padding():
    attention = dataclasses.replace(
        SMALL.attention, rope_type="dynamic_ntk", rope_original_positions=8
    )
    config = dataclasses.replace(SMALL, attention=attention)
    model = Hymba(config, ComputeConfig(), nnx.Rngs(0))
    text = list(range(3, 23))
    for token in generate(model, text, 4):
        assert token == int(jnp.argmax(model(jnp.asarray([text]))[0, -1]))
        text.append(token)


def test_sampling_follows_the_softmax():
    """4000 draws: a frequency's standard deviation is below 0.008; 5 of them are 0.04."""
    logits = jnp.asarray([0.0, 1.0, 2.0, -1.0])
    keys = jax.random.split(jax.random.key(3), 4000)
    drawn = np.asarray(jax.vmap(lambda key: pick(logits, key, 0.7))(keys))
    weights = np.exp(np.asarray(logits) / 0.7)
    frequencies = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(frequencies, weights / weights.sum(), atol=0.04)


def test_the_seed_decides(small):
    first = list(generate(small, [4], 20, temperature=1.0, seed=7))
    assert first == list(generate(small, [4], 20, temperature=1.0, seed=7))
    assert first != list(generate(small, [4], 20, temperature=1.0, seed=8))


@pytest.mark.parametrize(
    ("prompt", "new", "temperature", "message"),
    [
        ([1] * 60, 10, 0.0, "60 tokens and 10 new ones are more than the model's 64 positions"),
        ([1, 61], 1, 0.0, "token 61 is outside the vocabulary of 61"),
        ([1], 0, 0.0, "max_new_tokens is 0"),
        ([1], 1, -0.5, "temperature is -0.5"),
        ([1], 1, float("nan"), "temperature is nan"),
    ],
)
def test_impossible_requests(small, prompt, new, temperature, message):
    with pytest.raises(HymbaError, match=message):
        next(generate(small, prompt, new, temperature=temperature))
