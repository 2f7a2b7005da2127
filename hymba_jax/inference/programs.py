"""The programs that an engine compiles: functions of parameters and of a batch's state."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hymba_jax.config import CacheFormat, ComputeConfig, DType, HymbaConfig
from hymba_jax.inference.batch_state import (
    NO_TOKEN,
    NOT_FINITE,
    ChunkScores,
    DecodeState,
    PaddedChunk,
    Prefilled,
    SampledTokens,
    StopCriteria,
)
from hymba_jax.inference.sampling import MAX_ALTERNATIVES, PRNG, Sampler, likeliest, sample
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import Params
from hymba_jax.model.state import MetaState, ModelState
from hymba_jax.types import Array, Bool, Float, Int

DECODE_STEPS = 16  # tokens that a row samples at most before they are looked at
MIN_STOP_TOKENS = 4  # minimum capacity for stop tokens
LOGIT_POSITIONS = 128  # positions whose logits are in memory at once


class Programs(NamedTuple):
    """What an engine compiles, as jitted functions of arrays."""

    meta_state: Callable[..., MetaState]
    init_prefill: Callable[..., Prefilled]
    prefill: Callable[..., tuple[Prefilled, Array]]
    repeat: Callable[..., Prefilled]
    score: Callable[..., ChunkScores]
    init_state: Callable[..., DecodeState]
    sample_first: Callable[..., tuple[DecodeState, SampledTokens]]
    insert: Callable[..., DecodeState]
    stop: Callable[..., Bool[Array, "batch"]]
    set_bias: Callable[..., DecodeState]
    decode: Callable[..., tuple[DecodeState, SampledTokens]]
    verify: Callable[..., tuple[DecodeState, SampledTokens]]


@functools.lru_cache(maxsize=8)
def make_programs(
    graph: nnx.GraphDef[Hymba],
    config: HymbaConfig,
    compute: ComputeConfig,
    state_dtype: DType,
    kv_cache: CacheFormat,
) -> Programs:
    """The programs of a model, compiled as their shapes come; large arguments are reused."""

    def meta_state(params: Params) -> MetaState:
        return nnx.merge(graph, params).meta_state()

    def init_prefill(params: Params, meta: MetaState, batch: int, context: int) -> Prefilled:
        model = nnx.merge(graph, params)
        cache = model.init_state(batch, context, state_dtype, kv_cache).initialize(meta)
        return Prefilled(cache, jnp.zeros((batch, config.hidden_size), compute.dtype))

    def prefill(
        params: Params, meta: MetaState, state: Prefilled, chunk: PaddedChunk, is_start: bool
    ) -> tuple[Prefilled, Float[Array, "batch length hidden"]]:
        model = nnx.merge(graph, params)
        tokens, lengths = (jnp.asarray(a) for a in chunk)
        x, cache = model.extend(tokens, state.cache, meta, lengths, is_start=is_start)
        newest = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        return Prefilled(cache, jnp.where(lengths[:, None] > 0, newest, state.last_hidden)), x

    def score(
        params: Params,
        hidden: Float[Array, "batch length hidden"],
        targets: Int[Array, "batch length"],
        alternatives: Bool[Array, ""],
    ) -> ChunkScores:
        model = nnx.merge(graph, params)
        count = min(MAX_ALTERNATIVES, config.num_embeddings)

        def scores(at: slice) -> ChunkScores:
            logits = model.logits(hidden[:, at])
            largest = logits.max(-1, keepdims=True)
            log_sum = jnp.log(jnp.exp(logits - largest).sum(-1, keepdims=True))
            of_targets = jnp.take_along_axis(logits, targets[:, at, None], axis=-1)
            log_probs = (of_targets - largest - log_sum)[:, :, 0]

            def top() -> tuple[Array, Array]:
                values, tokens = jax.lax.top_k(logits, count)
                return tokens, values - largest - log_sum

            shape = (*log_probs.shape, count)
            return ChunkScores(
                jnp.where(jnp.isfinite(logits).all(-1), log_probs, jnp.nan),
                logits.argmax(-1) == targets[:, at],
                *jax.lax.cond(
                    alternatives, top, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
                ),
            )

        starts = range(0, hidden.shape[1], LOGIT_POSITIONS)
        parts = [scores(slice(start, start + LOGIT_POSITIONS)) for start in starts]
        return ChunkScores(*(jnp.concatenate(part, 1) for part in zip(*parts, strict=True)))

    def init_state(
        params: Params,
        meta: MetaState,
        batch: int,
        context: int,
        max_stop_tokens: int = MIN_STOP_TOKENS,
    ) -> DecodeState:
        zeros = jnp.zeros(batch, jnp.int32)
        key = jax.random.key(0, impl=PRNG)
        return DecodeState(
            cache=init_prefill(params, meta, batch, context).cache,
            token=zeros,
            num_sampled=zeros,
            stopped=zeros == 0,
            seen=jnp.zeros((batch, config.num_embeddings), bool),
            counts=jnp.zeros((batch, config.num_embeddings), jnp.int32),
            bias=jnp.zeros((batch, config.num_embeddings)),
            alternatives=zeros > 0,
            sampler=Sampler(
                temperature=jnp.zeros(batch),
                top_k=zeros,
                top_p=jnp.ones(batch),
                min_p=jnp.zeros(batch),
                repetition_penalty=jnp.ones(batch),
                frequency_penalty=jnp.zeros(batch),
                presence_penalty=jnp.zeros(batch),
                key=jnp.broadcast_to(key, batch),
            ),
            # With a dtype of its own, so that `decode` is the program of other states.
            stop=StopCriteria(zeros, jnp.full((batch, max_stop_tokens), NO_TOKEN, jnp.int32)),
        )

    def logits_of(params: Params, hidden: Float[Array, "rows hidden"]) -> Array:
        return nnx.merge(graph, params).logits(hidden[:, None])[:, 0]

    def advance(
        allowed: Bool[Array, "vocab"],
        state: DecodeState,
        logits: Float[Array, "batch vocab"],
        positions: Int[Array, "batch"],
    ) -> tuple[DecodeState, SampledTokens]:
        """Samples a token for each row that has not stopped."""
        finite = jnp.isfinite(logits).all(1)
        rows = jnp.arange(len(logits))
        token, log_probs = sample(
            logits, state.seen, positions, state.sampler, allowed, state.counts, state.bias
        )
        wanted = (state.alternatives & ~state.stopped).any()
        top_tokens, top_log_probs = likeliest(logits, wanted)
        is_stop = (token[:, None] == state.stop.stop_tokens).any(1)
        result = jnp.where(finite, jnp.where(is_stop, NO_TOKEN, token), NOT_FINITE)
        result = jnp.where(state.stopped, NO_TOKEN, result)
        ends = jnp.where(is_stop & finite & ~state.stopped, token, NO_TOKEN)
        num_sampled = state.num_sampled + ~state.stopped
        state = state._replace(
            token=token,
            num_sampled=num_sampled,
            stopped=state.stopped | is_stop | ~finite | (num_sampled >= state.stop.max_new_tokens),
            seen=state.seen.at[rows, token].set(True),
            counts=state.counts.at[rows, token].add(1),
        )
        values = (result, log_probs, top_tokens, top_log_probs, ends)
        tokens, log_probs, *top = (value[:, None] for value in values)
        return state, SampledTokens(tokens, log_probs, state.stopped, *top)

    def sample_first(
        params: Params,
        allowed: Bool[Array, "vocab"],
        cache: ModelState,
        last_hidden: Float[Array, "batch hidden"],
        sampler: Sampler,
        stop: StopCriteria,
        seen: Bool[Array, "batch vocab"],
        bias: Float[Array, "batch vocab"],
        alternatives: Bool[Array, "batch"],
    ) -> tuple[DecodeState, SampledTokens]:
        zeros = jnp.zeros(len(seen), jnp.int32)
        state = DecodeState(
            cache=cache,
            token=zeros,
            num_sampled=zeros,
            stopped=stop.max_new_tokens < 1,
            seen=seen,
            counts=jnp.zeros(seen.shape, jnp.int32),
            bias=bias,
            alternatives=alternatives,
            sampler=sampler,
            stop=stop,
        )
        return advance(allowed, state, logits_of(params, last_hidden), cache.lengths)

    def insert(state: DecodeState, new: DecodeState, rows: Int[Array, "batch"]) -> DecodeState:
        return jax.tree.map(lambda a, b: a.at[rows].set(b, mode="drop"), state, new)

    def set_bias(
        state: DecodeState, rows: Int[Array, "batch"], bias: Float[Array, "batch vocab"]
    ) -> DecodeState:
        return state._replace(bias=state.bias.at[rows].set(bias, mode="drop"))

    def decode(
        params: Params,
        meta: MetaState,
        allowed: Bool[Array, "vocab"],
        state: DecodeState,
        steps: Int[Array, ""],
    ) -> tuple[DecodeState, SampledTokens]:
        model = nnx.merge(graph, params)

        def is_running(loop: tuple[Array, DecodeState, SampledTokens]) -> Array:
            step, state, _ = loop
            return (step < steps) & ~state.stopped.all()

        def body(
            loop: tuple[Array, DecodeState, SampledTokens],
        ) -> tuple[Array, DecodeState, SampledTokens]:
            step, state, sampled = loop
            lengths = (~state.stopped).astype(jnp.int32)
            x, cache = model.extend(state.token[:, None], state.cache, meta, lengths)
            logits = logits_of(params, x[:, 0])
            state, new = advance(allowed, state._replace(cache=cache), logits, cache.lengths)
            return step + 1, state, sampled.with_step(step, new)

        start = (jnp.int32(0), state, nothing_sampled(state, DECODE_STEPS))
        _, state, sampled = jax.lax.while_loop(is_running, body, start)
        return state, sampled

    def verify(
        params: Params,
        meta: MetaState,
        allowed: Bool[Array, "vocab"],
        state: DecodeState,
        draft: Int[Array, "drafted"],
        num_drafted: Int[Array, ""],
    ) -> tuple[DecodeState, SampledTokens]:
        tokens, length = jnp.concatenate((state.token, draft)), state.cache.lengths

        def accept(
            x: Float[Array, "1 length hidden"],
        ) -> tuple[tuple[DecodeState, SampledTokens], Int[Array, "1"]]:
            logits = logits_of(params, x[0])

            def is_accepted(loop: tuple[Array, DecodeState, SampledTokens]) -> Array:
                """Whether the input of the next step is the token that was sampled before."""
                step, state, _ = loop
                is_sampled = (step == 0) | (state.token[0] == tokens[step])
                return is_sampled & (step <= num_drafted) & ~state.stopped[0]

            def body(
                loop: tuple[Array, DecodeState, SampledTokens],
            ) -> tuple[Array, DecodeState, SampledTokens]:
                step, state, sampled = loop
                state, new = advance(allowed, state, logits[step][None], length + 1 + step)
                return step + 1, state, sampled.with_step(step, new)

            start = (jnp.int32(0), state, nothing_sampled(state, len(tokens)))
            steps, after, sampled = jax.lax.while_loop(is_accepted, body, start)
            return (after, sampled), steps[None]

        (after, sampled), cache = nnx.merge(graph, params).verify(
            tokens[None], state.cache, meta, 1 + num_drafted[None], accept
        )
        return after._replace(cache=cache), sampled

    def nothing_sampled(state: DecodeState, steps: int) -> SampledTokens:
        shape = (len(state.token), steps)
        top = (*shape, min(MAX_ALTERNATIVES, config.num_embeddings))
        return SampledTokens(
            tokens=jnp.full(shape, NO_TOKEN),
            log_probs=jnp.zeros(shape),
            stopped=state.stopped,
            top_tokens=jnp.zeros(top, jnp.int32),
            top_log_probs=jnp.zeros(top),
            ends=jnp.full(shape, NO_TOKEN),
        )

    return Programs(
        meta_state=jax.jit(meta_state),
        init_prefill=jax.jit(init_prefill, static_argnames=("batch", "context")),
        prefill=jax.jit(prefill, static_argnames="is_start", donate_argnames="state"),
        repeat=jax.jit(lambda prefilled, rows: jax.tree.map(lambda a: a[rows], prefilled)),
        score=jax.jit(score),
        init_state=jax.jit(init_state, static_argnames=("batch", "context", "max_stop_tokens")),
        sample_first=jax.jit(sample_first, donate_argnames="cache"),
        insert=jax.jit(insert, donate_argnames="state"),
        stop=jax.jit(jnp.logical_or),
        set_bias=jax.jit(set_bias, donate_argnames="state"),
        decode=jax.jit(decode, donate_argnames="state"),
        verify=jax.jit(verify, donate_argnames="state"),
    )
