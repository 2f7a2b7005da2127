"""Sampling the next token."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hymba_jax.config.sampling import INT32_MAX, SamplingConfig
from hymba_jax.ops.platform import target_platform
from hymba_jax.types import Array, Bool, Float, Int, Key, UInt

# The JAX generator whose samples do not depend on other rows.
PRNG = "threefry2x32"
PROBABILITY_SCALE = (
    2**30
)  # a probability of 1, where probabilities are integers: see `token_weights`

MAX_ALTERNATIVES = 20  # likeliest tokens that are reported beside a sampled one, at most


class Sampler(NamedTuple):
    """The sampling values of each row of a batch, as in `SamplingConfig`; rows may differ."""

    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]
    min_p: Float[Array, " batch"]
    repetition_penalty: Float[Array, " batch"]
    frequency_penalty: Float[Array, " batch"]
    presence_penalty: Float[Array, " batch"]
    key: Key[Array, " batch"]


def make_sampler(configs: Sequence[SamplingConfig], samples: Sequence[int]) -> Sampler:
    """Row i gets sample number `samples[i]` of `configs[i]`, whatever the other rows are."""

    values = functools.partial(_values, configs)
    return Sampler(
        temperature=values("temperature", np.float32),
        top_k=values("top_k", np.int32),
        top_p=values("top_p", np.float32),
        min_p=values("min_p", np.float32),
        repetition_penalty=values("repetition_penalty", np.float32),
        frequency_penalty=values("frequency_penalty", np.float32),
        presence_penalty=values("presence_penalty", np.float32),
        key=_keys(np.array([config.seed for config in configs], np.uint32), np.array(samples)),
    )


def _values(configs: Sequence[SamplingConfig], name: str, dtype: type) -> Array:
    return jnp.asarray(np.array([getattr(config, name) for config in configs], dtype))


@jax.jit
@jax.vmap
def _keys(seed: UInt[Array, ""], number: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(seed, impl=PRNG), number)


class ActiveFilters(NamedTuple):
    """Which filters any row uses; others are not computed."""

    penalty: Bool[Array, ""]
    sampling: Bool[Array, ""]
    top_k: Bool[Array, ""]
    top_p: Bool[Array, ""]


def sample(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    positions: Int[Array, " batch"],
    sampler: Sampler,
    allowed: Bool[Array, " vocab"] | None = None,
    counts: Int[Array, "batch vocab"] | None = None,
    bias: Float[Array, "batch vocab"] | None = None,
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """The next token of each row, and its log-probability in the model's own distribution.

    Tokens that are not allowed go first, then come bias, penalties (repetition, frequency,
    presence), temperature, top-k, top-p and min-p, each among what the one before has left; tokens
    as likely as the last one kept are kept too. A row's result depends, to the bit, on its own
    logits, values, key and position only.

    Args:
      logits: in float32; -inf for what cannot come next.
      seen: the tokens that the repetition penalty is for.
      positions: where in its sequence each row's token will be; different positions give different
        samples.
      allowed: the tokens that may be sampled; all of them if absent. The log-probability is that
        among all tokens.
      counts: how often each token is in the completion, which the frequency and the presence
        penalty are for; no token is if absent.
      bias: added to the logits; none if absent.
    """
    active = ActiveFilters(
        penalty=jnp.any(
            (sampler.repetition_penalty != 1)
            | (sampler.frequency_penalty != 0)
            | (sampler.presence_penalty != 0)
        ),
        sampling=jnp.any(sampler.temperature > 0),
        top_k=jnp.any(sampler.top_k > 0),
        top_p=jnp.any(sampler.top_p < 1),
    )
    row = functools.partial(_sample_row, active, allowed)
    rows = (logits, seen, positions, sampler, counts, bias)
    return _by_row(row, rows)


def likeliest(
    logits: Float[Array, "batch vocab"],
    wanted: Bool[Array, ""],
) -> tuple[Int[Array, "batch alternatives"], Float[Array, "batch alternatives"]]:
    """The MAX_ALTERNATIVES likeliest tokens of each row, and their log-probabilities.

    Both are in the model's own distribution over its whole vocabulary, the likeliest first. All
    zeros unless they are `wanted`.
    """
    batch, vocab = logits.shape
    count = min(MAX_ALTERNATIVES, vocab)

    def row(logits: Float[Array, " vocab"]) -> tuple[Array, Array]:
        log_probs, tokens = jax.lax.top_k(_log_softmax(logits), count)
        return tokens, log_probs

    zeros = jnp.zeros((batch, count), jnp.int32), jnp.zeros((batch, count))
    return jax.lax.cond(wanted, lambda: _by_row(row, (logits,)), lambda: zeros)


def _by_row(function: Callable[..., Any], rows: tuple[Any, ...]) -> Any:
    """The function of each row's values."""
    if target_platform() == "cpu":  # one after another: a row fits into a cache
        return jax.lax.map(lambda values: function(*values), rows)
    return jax.vmap(function)(*rows)


def _sample_row(
    active: ActiveFilters,
    allowed: Bool[Array, " vocab"] | None,
    logits: Float[Array, " vocab"],
    seen: Bool[Array, " vocab"],
    position: Int[Array, ""],
    sampler: Sampler,
    counts: Int[Array, " vocab"] | None,
    bias: Float[Array, " vocab"] | None,
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """`sample` for one row, whose values `sampler` holds."""
    possible = logits if bias is None else logits + bias
    possible = possible if allowed is None else jnp.where(allowed, possible, -jnp.inf)
    penalised = jax.lax.cond(
        active.penalty,
        lambda: _penalise(possible, seen, counts, sampler),
        lambda: possible,
    )
    first = _argmax(penalised)

    def sampled() -> Int[Array, ""]:
        weights = token_weights(active, penalised, sampler)
        token = _sample_token(weights, jax.random.fold_in(sampler.key, position))
        return jnp.where(sampler.temperature > 0, token, first)

    token = jax.lax.cond(active.sampling, sampled, lambda: first)
    return token, _log_softmax(logits)[token]


def _log_softmax(logits: Float[Array, " vocab"]) -> Float[Array, " vocab"]:
    below = logits - jnp.max(logits)
    return below - jnp.log(_sum(jnp.exp(below)))


def _penalise(
    logits: Float[Array, " vocab"],
    seen: Bool[Array, " vocab"],
    counts: Int[Array, " vocab"] | None,
    sampler: Sampler,
) -> Float[Array, " vocab"]:
    """Logits of seen tokens, divided if positive and multiplied if negative (arXiv 1909.05858).

    The other penalties are subtracted: one for each time in the completion, one if there at all.
    """
    penalty = sampler.repetition_penalty
    largest = jnp.finfo(logits.dtype).max  # a tiny penalty must not make an infinity
    penalised = jnp.where(logits > 0, jnp.minimum(logits / penalty, largest), logits * penalty)
    penalised = jnp.where(seen, penalised, logits)
    if counts is None:
        return penalised
    return penalised - sampler.frequency_penalty * counts - sampler.presence_penalty * (counts > 0)


def token_weights(
    active: ActiveFilters, logits: Float[Array, " vocab"], sampler: Sampler
) -> Int[Array, " vocab"]:
    """Each token's weight after temperature and filters, in units of 1 / PROBABILITY_SCALE.

    Probabilities are integers because their sums do not depend on the order of adding, as a
    float's last bits would. Their error is that of float32: half of 2**-30.
    """
    temperature = jnp.where(sampler.temperature > 0, sampler.temperature, 1)
    # Subtracted before the division, so that no temperature is too small.
    gap = (jnp.max(logits) - logits) / temperature
    order = jax.lax.bitcast_convert_type(gap, jnp.int32)  # sorts as the floats do: none is below 0

    count = jnp.where(sampler.top_k > 0, sampler.top_k, INT32_MAX)
    limit = jax.lax.cond(
        active.top_k,
        lambda: _threshold(order, jnp.ones_like(order), count, bits=31),
        lambda: jnp.int32(INT32_MAX),
    )
    odds = jnp.exp(-gap)
    left = jnp.where(order <= limit, odds, 0)
    weights = jnp.round(left * (PROBABILITY_SCALE / _sum(left))).astype(jnp.int32)

    share = jnp.maximum(1, jnp.ceil(sampler.top_p * PROBABILITY_SCALE).astype(jnp.int32))
    share = jnp.where(sampler.top_p < 1, share, INT32_MAX)
    limit = jax.lax.cond(
        active.top_p,
        lambda: _threshold(order, weights, share, bits=31),
        lambda: jnp.int32(INT32_MAX),
    )
    return jnp.where((order <= limit) & (odds >= sampler.min_p), weights, 0)


def _sample_token(weights: Int[Array, " vocab"], key: Key[Array, ""]) -> Int[Array, ""]:
    """Samples a token in proportion to its weight, by the inverse CDF: its block, then itself."""
    # The high half of the product is spread evenly below the sum. `jax.random.randint` takes a
    # remainder of 32 bits, which favours small numbers where the sum is this large.
    total = jnp.sum(weights, dtype=jnp.uint32)
    offset = jax.lax.mulhi(jax.random.bits(key, (), jnp.uint32), total).astype(jnp.int32)
    width = math.isqrt(len(weights) - 1) + 1
    blocks = jnp.pad(weights, (0, -len(weights) % width)).reshape(-1, width)
    block, offset = _at_offset(blocks.sum(1), offset)
    place, _ = _at_offset(blocks[block], offset)
    return block * width + place


def _at_offset(
    weights: Int[Array, " n"], offset: Int[Array, ""]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Which of the weights, laid end to end, an offset below their sum is in, and how far."""
    before = jnp.cumsum(weights) - weights
    found = jnp.sum(before <= offset, dtype=jnp.int32) - 1
    return found, offset - before[found]


def _threshold(
    order: Int[Array, " vocab"],
    weights: Int[Array, " vocab"],
    target_sum: Int[Array, ""],
    bits: int,
) -> Int[Array, ""]:
    """Where the weights, in `order`, sum to `target_sum`; above all values if they never do.

    Found bit by bit, which costs a tenth of a sort.
    """

    def narrow(i: Int[Array, ""], found: Int[Array, ""]) -> Int[Array, ""]:
        further = found | (1 << (bits - 1 - i))
        before = jnp.sum(jnp.where(order < further, weights, 0), dtype=jnp.int32)
        return jnp.where(before < target_sum, further, found)

    return jax.lax.fori_loop(0, bits, narrow, jnp.zeros_like(target_sum))


def _argmax(logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    """The first of the largest; two plain reductions, faster than `jnp.argmax`'s one on CPUs."""
    last = len(logits) - 1
    numbers = jnp.arange(last + 1, dtype=jnp.int32)
    return jnp.min(jnp.where(logits == jnp.max(logits), numbers, last))


def _sum(values: Float[Array, " vocab"]) -> Float[Array, ""]:
    """The sum, added in the same order however many rows a device adds up at once."""
    width = 1 << (len(values) - 1).bit_length()
    values = jnp.pad(values, (0, width - len(values)))
    while width > 1:
        width //= 2
        values = values[:width] + values[width:]
    return values[0]
