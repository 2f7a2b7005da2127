"""Sampled tokens, against a float64 oracle that sorts, and what they depend on."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but

from hymba_jax.config.escapes import unescape
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference import sampling
from hymba_jax.inference.sampling import (
    PROBABILITY_SCALE,
    ActiveFilters,
    likeliest,
    make_sampler,
    sample,
    token_weights,
)

SAMPLED = SamplingConfig(temperature=1.0)
ALL_ON = SamplingConfig(
    temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3, seed=5
)
MIXED = (
    SamplingConfig(),
    SamplingConfig(repetition_penalty=2.0),
    SAMPLED,
    SamplingConfig(temperature=1.5, top_k=5, seed=2**32 - 1),
    SamplingConfig(temperature=0.9, top_p=0.5, seed=1),
    SamplingConfig(temperature=1.2, min_p=0.1, seed=2),
    ALL_ON,
)
jitted = jax.jit(sample)


def probabilities(logits, config, slack=0.0):
    """The filtered distribution in float64; `slack` widens what top-p and min-p keep."""
    logits = np.asarray(logits, np.float64) / config.temperature
    odds = np.exp(logits - logits.max())
    if config.top_k:
        odds[odds < np.sort(odds)[::-1][min(config.top_k, len(odds)) - 1]] = 0
    if config.top_p < 1:
        falling = np.sort(odds)[::-1]
        sums = np.cumsum(falling) / falling.sum()
        odds[odds < falling[np.argmax(sums >= min(config.top_p + slack, sums[-1]))]] = 0
    odds[odds < config.min_p - slack] = 0
    return odds / odds.sum()


def weights(logits, config):
    """`token_weights` for one row, as probabilities."""
    row = jax.tree.map(lambda values: values[0], make_sampler([config], [0]))
    active = ActiveFilters(*[jnp.array(True)] * 4)
    return (
        np.asarray(jax.jit(token_weights)(active, jnp.asarray(logits, jnp.float32), row))
        / PROBABILITY_SCALE
    )


def sample_many(logits, config, count):
    """`count` samples from the same logits, at as many positions."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    sampler = make_sampler([config], [0])
    sampler = jax.tree.map(lambda values: jnp.repeat(values, count), sampler)
    tokens, log_probs = jitted(rows, jnp.zeros(rows.shape, bool), jnp.arange(count), sampler)
    return np.asarray(tokens), np.asarray(log_probs)


def random_logits(kind, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=499) * {"flat": 0.01, "steep": 20}.get(kind, 3)
    if kind == "ties":
        logits = np.round(logits)
    if kind == "forbidden":
        logits[rng.permutation(len(logits))[:-12]] = -np.inf
    return np.float32(logits)


@pytest.mark.parametrize("kind", ["plain", "flat", "steep", "ties", "forbidden"])
def test_the_filters_keep_what_sorting_keeps(kind):
    for seed, (top_k, top_p, min_p, temperature) in enumerate(
        itertools.product(
            (0, 1, 7, 10**9), (1.0, 0.999, 0.6, 1e-30), (0.0, 0.2, 0.9999), (1.0, 0.3)
        )
    ):
        config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        logits = random_logits(kind, seed)
        actual = weights(logits, config)
        # Where a sum or a quotient falls on the limit itself, float32 may go either way.
        surely, perhaps = (probabilities(logits, config, slack) for slack in (-1e-6, 1e-6))
        visible = perhaps > 2 / PROBABILITY_SCALE
        assert not (actual[visible & (surely > 0)] == 0).any()
        assert not (actual > 0)[perhaps == 0].any()
        assert actual.argmax() == logits.argmax()
        if ((surely > 0) == (perhaps > 0)).all():
            np.testing.assert_allclose(actual / actual.sum(), surely, rtol=2e-5, atol=1e-7)


def test_ties_at_a_limit_are_all_kept():
    logits = np.log([0.3, 0.2, 0.1, 0.2, 0.2])
    for config in (
        dataclasses.replace(SAMPLED, top_k=2),
        dataclasses.replace(SAMPLED, top_p=0.4),
        dataclasses.replace(SAMPLED, min_p=0.6),
    ):
        np.testing.assert_array_equal(weights(logits, config) > 0, [1, 1, 0, 1, 1])


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 3)])
def test_top_p_is_reached_by_the_token_that_completes_it(top_p, kept):
    config = dataclasses.replace(SAMPLED, top_p=top_p)
    assert (weights(np.log([0.2, 0.5, 0.3]), config) > 0).sum() == kept


@pytest.mark.parametrize(
    "config",
    [
        SAMPLED,
        SamplingConfig(temperature=2.0, top_k=6, seed=1),
        SamplingConfig(temperature=0.5, top_p=0.9, seed=2),
        SamplingConfig(temperature=1.0, min_p=0.1, seed=3),
        SamplingConfig(temperature=1.5, top_k=8, top_p=0.95, min_p=0.05, seed=4),
    ],
)
def test_tokens_are_sampled_as_often_as_they_are_likely(config):
    count = 20_000
    logits = np.float32(np.random.default_rng(0).normal(size=11) * 1.5)
    expected = count * probabilities(logits, config)
    times = np.bincount(sample_many(logits, config, count)[0], minlength=len(logits))
    kept = expected > 0
    assert times[~kept].sum() == 0
    freedom = kept.sum() - 1
    distance = ((times - expected)[kept] ** 2 / expected[kept]).sum()
    assert distance < freedom + 4 * np.sqrt(2 * freedom)  # chi-square, four deviations


def test_samples_of_a_prompt_differ():
    count = 800
    sampler = make_sampler([SAMPLED] * count, range(count))
    shape = (count, 4)
    logits, seen = jnp.zeros(shape), jnp.zeros(shape, bool)
    first, _ = jitted(logits, seen, jnp.full(count, 3), sampler)
    second, _ = jitted(logits, seen, jnp.full(count, 4), sampler)
    pairs = np.bincount(4 * np.asarray(first) + np.asarray(second), minlength=16)
    assert ((pairs - count / 16) ** 2 / (count / 16)).sum() < 15 + 4 * np.sqrt(2 * 15)


def test_the_same_seed_sample_and_position_give_the_same():
    logits = np.zeros(1000)
    tokens, _ = sample_many(logits, SAMPLED, 50)
    again, _ = sample_many(logits, SAMPLED, 50)
    other_seed, _ = sample_many(logits, dataclasses.replace(SAMPLED, seed=1), 50)
    np.testing.assert_array_equal(tokens, again)
    assert len(set(tokens)) > 40
    assert (tokens != other_seed).sum() > 40


@pytest.mark.parametrize("vocab", slow_but([1, 61, 32001], 1, 32001))
def test_a_row_depends_on_nothing_beside_it(vocab, monkeypatch):
    rng = np.random.default_rng(vocab)
    size = len(MIXED)
    logits = jnp.asarray(rng.normal(size=(size, vocab)) * 4, jnp.float32)
    seen = jnp.asarray(rng.random((size, vocab)) < 0.3)
    positions = jnp.arange(size, dtype=jnp.int32) * 7
    sampler = make_sampler(MIXED, range(size))
    rows = (logits, seen, positions, sampler)
    together = jitted(*rows)
    for i in range(size):
        alone = jitted(*jax.tree.map(lambda values, i=i: values[i : i + 1], rows))
        assert (alone[0][0], alone[1][0]) == (together[0][i], together[1][i])
    reverse = jitted(*jax.tree.map(lambda values: values[::-1], rows))
    np.testing.assert_array_equal(reverse[0][::-1], together[0])
    np.testing.assert_array_equal(reverse[1][::-1], together[1])
    # What accelerators run: all rows at once.
    monkeypatch.setattr(sampling, "target_platform", lambda: "gpu")
    at_once = jax.jit(lambda *rows: sample(*rows))(*rows)
    np.testing.assert_array_equal(at_once[0], together[0])
    np.testing.assert_array_equal(at_once[1], together[1])


def test_log_probabilities_are_the_model_s_own():
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(size=(len(MIXED), 32001)) * 5)
    logits[:, 5:100] = -np.inf
    seen = jnp.asarray(rng.random(logits.shape) < 0.5)
    sampler = make_sampler(MIXED, range(len(MIXED)))
    tokens, actual = jitted(jnp.asarray(logits), seen, jnp.arange(len(MIXED)), sampler)
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    expected = np.take_along_axis(exact, np.asarray(tokens)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_greedy_is_the_first_of_the_likeliest():
    logits = random_logits("ties", 0)
    logits[[400, 77, 200]] = 50
    tokens, _ = sample_many(logits, SamplingConfig(), 3)
    np.testing.assert_array_equal(tokens, [77] * 3)


@pytest.mark.parametrize(
    "config", [SamplingConfig(), SAMPLED, ALL_ON, dataclasses.replace(SAMPLED, temperature=1e30)]
)
def test_tokens_that_are_not_allowed_are_never_sampled(config):
    """Though they are the likeliest; log-probabilities stay those among all tokens."""
    logits = np.float32([9, 1, 8, 1, 9, 2])
    allowed = np.array([0, 1, 0, 1, 0, 1], bool)
    count = 200
    rows = jnp.broadcast_to(logits, (count, 6))
    sampler = jax.tree.map(lambda v: jnp.repeat(v, count), make_sampler([config], [0]))
    seen = jnp.broadcast_to(np.array([1, 1, 0, 0, 0, 0], bool), (count, 6))
    tokens, log_probs = jitted(rows, seen, jnp.arange(count), sampler, jnp.asarray(allowed))
    assert set(np.asarray(tokens).tolist()) <= {1, 3, 5}
    if config == SamplingConfig():
        assert set(np.asarray(tokens).tolist()) == {5}
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(log_probs, exact[np.asarray(tokens)], rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "seen", "penalty", "token"),
    [
        ([3.0, 2.0, -1.0], [1, 0, 0], 1.4, 0),  # 3 / 1.4 = 2.14
        ([3.0, 2.0, -1.0], [1, 0, 0], 1.6, 1),  # 3 / 1.6 = 1.88
        ([-1.0, -1.5, -9.0], [1, 0, 0], 1.4, 0),  # -1 * 1.4
        ([-1.0, -1.5, -9.0], [1, 0, 0], 1.6, 1),  # -1 * 1.6
        ([3.0, 2.0, -1.0], [0, 1, 0], 0.5, 1),  # 2 / 0.5 = 4
        ([3.0, 2.0, -1.0], [0, 0, 0], 9.0, 0),
        ([3.0, 2.0, -np.inf], [0, 1, 1], 1e-30, 1),
        ([3e20, 2e20, -np.inf], [0, 1, 1], 1e-30, 1),  # 2e20 / 1e-30 is beyond float32
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_the_penalty_is_for_seen_tokens(logits, seen, penalty, token, temperature):
    config = SamplingConfig(temperature=temperature, repetition_penalty=penalty)
    rows = jnp.asarray([logits], jnp.float32), jnp.asarray([seen], bool), jnp.zeros(1, int)
    tokens, log_probs = jitted(*rows, make_sampler([config], [0]))
    assert tokens[0] == token
    assert np.isfinite(log_probs[0])


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_penalties_of_the_completion_and_bias(temperature):
    """Against the formula in float64, with the repetition penalty before the others."""
    rng = np.random.default_rng(1)
    shape, values = (60, 11), rng.choice([0.0, 0.4, -1.5, 2.0], size=(60, 2))
    logits, bias = (np.float32(rng.normal(size=shape) * 2) for _ in range(2))
    counts, seen = rng.integers(0, 4, shape), rng.random(shape) < 0.3
    configs = [
        SamplingConfig(
            temperature=temperature,
            repetition_penalty=1.3,
            frequency_penalty=frequency,
            presence_penalty=presence,
        )
        for frequency, presence in values
    ]
    tokens, log_probs = jitted(
        jnp.asarray(logits),
        jnp.asarray(seen),
        jnp.arange(60),
        make_sampler(configs, range(60)),
        None,
        jnp.asarray(counts),
        jnp.asarray(bias),
    )
    biased = np.float64(logits) + bias
    penalised = np.where(biased > 0, biased / 1.3, biased * 1.3)
    penalised = np.where(seen, penalised, biased)
    penalised -= values[:, :1] * counts + values[:, 1:] * (counts > 0)
    np.testing.assert_array_equal(tokens, penalised.argmax(1))
    rows = np.arange(60)
    expected = np.float64(logits)[rows, tokens] - np.log(np.exp(np.float64(logits)).sum(1))
    np.testing.assert_allclose(log_probs, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [7, 499])
def test_the_likeliest_tokens(vocab):
    """Against sorting in float64; nothing is computed unless it is wanted."""
    logits = np.stack([np.resize(random_logits(kind, 3), vocab) for kind in ("plain", "steep")])
    jitted_likeliest = jax.jit(likeliest)
    tokens, log_probs = jitted_likeliest(jnp.asarray(logits), True)
    exact = np.float64(logits)
    exact -= np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True)) + exact.max(
        1, keepdims=True
    )
    best = np.argsort(-exact, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(tokens, best)
    np.testing.assert_allclose(
        log_probs, np.take_along_axis(exact, best, axis=1), rtol=1e-6, atol=1e-6
    )
    assert not np.any(jitted_likeliest(jnp.asarray(logits), False))


@pytest.mark.parametrize(("temperature", "possible"), [(1e-30, {1}), (1e-4, {1}), (1e30, {0, 1})])
@pytest.mark.parametrize("logits", [[1.0, 2.0, -np.inf], [-1e20, 1e20, -np.inf]])
def test_extremes(temperature, possible, logits):
    config = SamplingConfig(temperature=temperature, top_k=3, top_p=0.999999, min_p=1e-9)
    tokens, log_probs = sample_many(logits, config, 64)
    assert set(tokens.tolist()) == possible
    assert not np.isnan(log_probs).any()


def test_samples_inside_a_loop():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 61)), jnp.float32)
    sampler = make_sampler([ALL_ON, SamplingConfig()], [1, 0])

    @jax.jit
    def three_tokens(sampler):
        def body(state):
            i, seen, tokens = state
            new, _ = sample(logits, seen, jnp.full(2, i), sampler)
            return i + 1, seen.at[jnp.arange(2), new].set(True), tokens.at[:, i].set(new)

        start = (0, jnp.zeros((2, 61), bool), jnp.zeros((2, 3), jnp.int32))
        return jax.lax.while_loop(lambda state: state[0] < 3, body, start)[2]

    tokens = three_tokens(sampler)
    seen = jnp.zeros((2, 61), bool)
    for i in range(3):
        new, _ = jitted(logits, seen, jnp.full(2, i), sampler)
        np.testing.assert_array_equal(tokens[:, i], new)
        seen = seen.at[jnp.arange(2), new].set(True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, not between 1 and 2147483647"),
        ({"max_new_tokens": 10**12}, f"max_new_tokens is {10**12}, not between 1 and 2147483647"),
        ({"max_new_tokens": True}, "max_new_tokens is True, not an integer"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0, not an integer"),
        ({"temperature": -0.5}, "temperature is -0.5, not 0 or between 1e-30 and 1e30"),
        ({"temperature": float("nan")}, "temperature is nan, not 0 or between 1e-30 and 1e30"),
        ({"temperature": float("inf")}, "temperature is inf, not 0 or between 1e-30 and 1e30"),
        ({"temperature": 2e30}, "temperature is 2e+30, not 0 or between 1e-30 and 1e30"),
        ({"temperature": 1e-50}, "temperature is 1e-50, not 0 or between 1e-30 and 1e30"),
        ({"temperature": "hot"}, "temperature is 'hot', not a number"),
        ({"top_k": -1}, "top_k is -1, not between 0 and 2147483647"),
        ({"top_k": 2**31}, "top_k is 2147483648, not between 0 and 2147483647"),
        ({"top_k": 5.0}, "top_k is 5.0, not an integer"),
        ({"top_p": 0.0}, "top_p is 0.0, not in (0, 1]"),
        ({"top_p": 1.01}, "top_p is 1.01, not in (0, 1]"),
        ({"top_p": float("nan")}, "top_p is nan, not in (0, 1]"),
        ({"min_p": 1.0}, "min_p is 1.0, not in [0, 1)"),
        ({"min_p": -0.1}, "min_p is -0.1, not in [0, 1)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, not between 1e-30 and 1e30"),
        ({"repetition_penalty": np.inf}, "repetition_penalty is inf, not between 1e-30 and 1e30"),
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1, not between -2 and 2"),
        ({"presence_penalty": np.nan}, "presence_penalty is nan, not between -2 and 2"),
        (
            {"num_samples": 0},
            "num_samples is 0, not between 1 and 1048576: all completions are kept in memory",
        ),
        (
            {"num_samples": 10**10},
            f"num_samples is {10**10}, not between 1 and 1048576: all completions are kept in "
            "memory",
        ),
        ({"seed": -1}, "seed is -1, not between 0 and 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296, not between 0 and 4294967295"),
        ({"seed": None}, "seed is None, not an integer"),
        ({"stop": b"end"}, "stop is b'end', not a list, each a string"),
        ({"stop": ["a", 1]}, "stop is ('a', 1), not a list, each a string"),
        ({"stop": ("a\n", "")}, r"stop is ('a\n', ''), not a list of non-empty strings"),
        ({"stop": ""}, "stop is ('',), not a list of non-empty strings"),
        ({"stop_tokens": 2}, "stop_tokens is 2, not a list, each an integer"),
        ({"stop_tokens": [2.0]}, "stop_tokens is (2.0,), not a list, each an integer"),
        ({"stop_tokens": [True]}, "stop_tokens is (True,), not a list, each an integer"),
        ({"stop_tokens": (3, -2)}, "stop_tokens is (3, -2), not between 0 and 2147483647"),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(HymbaError) as error:
        SamplingConfig(**changes)
    assert str(error.value) == f"sampling: {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.9}, "top_p 0.9 has no effect at temperature 0, which always takes the likel"),
        ({"top_k": 5}, "top_k 5 has no effect at temperature 0"),
        ({"min_p": 0.1}, "min_p 0.1 has no effect at temperature 0"),
        ({"num_samples": 2}, "num_samples 2 has no effect at temperature 0"),
    ],
)
def test_values_without_effect_are_refused(changes, message):
    with pytest.raises(HymbaError) as error:
        SamplingConfig(**changes)
    assert str(error.value).startswith(f"sampling: {message}")
    assert vars(SamplingConfig(**changes, temperature=0.5)).items() >= changes.items()


def test_several_values_without_effect_are_all_named():
    with pytest.raises(HymbaError) as error:
        SamplingConfig(top_k=5, top_p=0.5, min_p=0.5, num_samples=2, repetition_penalty=1.5)
    assert str(error.value).count("no effect") == 4


def test_values_are_kept_as_plain_ones():
    asked = SamplingConfig(
        max_new_tokens=np.int64(9),
        temperature=np.float32(0.5),
        top_k=np.uint8(3),
        seed=np.int32(4),
        stop="\\n",
        stop_tokens=np.array([5, 6]),
    )
    plain = SamplingConfig(
        max_new_tokens=9, temperature=0.5, top_k=3, seed=4, stop=("\\n",), stop_tokens=(5, 6)
    )
    assert repr(asked) == repr(plain)
    assert SamplingConfig(stop=["a", "b"]) == SamplingConfig(stop=("a", "b"))
    assert SamplingConfig(stop=np.array(["a"])) == SamplingConfig(stop="a")


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        (r"\n\n", "\n\n"),
        (r"\\n", r"\n"),
        (r"a\tb\r", "a\tb\r"),
        (r"\x41\u4e2d\U0001f600", "A中😀"),
        ("中 é", "中 é"),
    ],
)
def test_escapes_of_the_command_line(text, stop):
    assert unescape(text) == stop


@pytest.mark.parametrize("text", [r"\d", "a\\", r"\x4", r"\U00110000"])
def test_escapes_that_there_are_not(text):
    with pytest.raises(HymbaError, match="is not an escape; valid are"):
        unescape(text)


def test_every_problem_is_named_in_one_line():
    with pytest.raises(HymbaError) as error:
        SamplingConfig(temperature="\n", top_p=2.0, stop=("",), seed=-1)
    assert str(error.value).count(";") == 3
    assert "\n" not in str(error.value)


def test_the_largest_values_are_possible():
    largest = SamplingConfig(
        temperature=1e30, top_k=2**31 - 1, seed=2**32 - 1, repetition_penalty=1e30, stop=("\n",)
    )
    make_sampler([largest], [2**32 - 1])


def test_a_row_needs_a_config_and_a_sample_number():
    with pytest.raises(ValueError, match="inconsistent sizes"):
        make_sampler([SAMPLED, SAMPLED], [0])
