"""The compiled side of inference: prompts go in as tokens, completions come out as tokens.

    prefill   a batch of prompts, in chunks, each starting from the state after the meta tokens
    insert    requests for what was prefilled: a new batch, or rows of one that is running
    decode    one loop on the device, a token for every row at a time, until all rows have stopped
    verify    one row by several drafted tokens at once, as many as are what is sampled

A program is compiled once for each shape; shapes are rounded up (`bucket`), so they are few.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.config import CacheFormat, ComputeConfig, DType, HymbaConfig, WeightFormat
from hymba_jax.config.field_types import shown
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.memory import cache_bytes, meta_state_bytes
from hymba_jax.inference.sampling import (
    MAX_ALTERNATIVES,
    PRNG,
    Sampler,
    likeliest,
    make_sampler,
    sample,
)
from hymba_jax.model import Hymba, fuse_projections, merge_adapters, unstack_layers
from hymba_jax.model.abstract import Params
from hymba_jax.model.quantized import quantize_kernels
from hymba_jax.model.rope import max_fixed_positions
from hymba_jax.model.state import MetaState, ModelState
from hymba_jax.parallel.memory import check_fits, tree_bytes
from hymba_jax.types import Array, Bool, Float, Int

MIN_CHUNK = 32
MAX_CHUNK = 1024
MIN_CONTEXT = 256
MIN_STOP_TOKENS = 4  # minimum capacity for stop tokens
DECODE_STEPS = 16  # tokens that a row samples at most before they are looked at
MAX_DRAFT = 15  # drafted tokens that are verified at once
NO_TOKEN = -1
NOT_FINITE = -2  # marks a row whose logits are NaN or infinite
VOCAB_BYTES = 1 + 4 + 4  # of seen, counts and bias, for each row and token of the vocabulary
LOGIT_POSITIONS = 128  # positions whose logits are in memory at once


class Request(NamedTuple):
    """One sequence to sample.

    Attributes:
      prompt: its tokens, for the repetition penalty.
      sampling: how tokens are sampled; its stop criteria and max_new_tokens are ignored.
      sample: index among the prompt's samples.
      max_new_tokens: maximum number of tokens.
      stop_tokens: tokens that end it and are not part of it.
      logit_bias: tokens with what is added to their logits.
      alternatives: whether the likeliest tokens are reported beside each sampled one.
      mask: tokens that its first one may be; all if absent. See `Engine.set_bias` for the others.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig
    sample: int
    max_new_tokens: int
    stop_tokens: Sequence[int] = ()
    logit_bias: Sequence[tuple[int, float]] = ()
    alternatives: bool = False
    mask: Bool[np.ndarray, "vocab"] | None = None

    def bias(self, vocab_size: int) -> Float[np.ndarray, " vocab"]:
        """What is added to the logits of each token: its logit bias, -inf where masked."""
        bias = np.zeros(vocab_size, np.float32)
        for token, value in self.logit_bias:
            bias[token] = value
        return bias if self.mask is None else np.where(self.mask, bias, np.float32(-np.inf))


class StopCriteria(NamedTuple):
    """When rows stop: after so many tokens, or at one of these (padded with NO_TOKEN)."""

    max_new_tokens: Int[Array, "batch"]
    stop_tokens: Int[Array, "batch stop_tokens"]


class SampledTokens(NamedTuple):
    """Sampled tokens by row and step, with log-probabilities, and which rows have stopped.

    NO_TOKEN after a row has stopped, NOT_FINITE if its logits were not finite. The likeliest
    tokens are there, as of `sampling.likeliest`, if any row asks for alternatives. A stop token,
    which is none of `tokens`, is in `ends` at the step in which it ended its row.
    """

    tokens: Int[Array, "batch steps"]
    log_probs: Float[Array, "batch steps"]
    stopped: Bool[Array, "batch"]
    top_tokens: Int[Array, "batch steps alternatives"]
    top_log_probs: Float[Array, "batch steps alternatives"]
    ends: Int[Array, "batch steps"]

    def with_step(self, step: Int[Array, ""], new: "SampledTokens") -> "SampledTokens":
        """These with the tokens of one more step."""
        steps = {
            name: array.at[:, step].set(getattr(new, name)[:, 0])
            for name, array in self._asdict().items()
            if name != "stopped"
        }
        return SampledTokens(**steps, stopped=new.stopped)


class DecodeState(NamedTuple):
    """A running batch.

    Attributes:
      token: the last sampled token of each row, not in the cache yet.
      num_sampled: tokens sampled so far.
      stopped: rows that are complete; their cache no longer changes.
      seen: the tokens in each sequence, for the repetition penalty.
      counts: how often each token was sampled, for the frequency and the presence penalty.
      bias: added to the logits.
      alternatives: rows that ask for the likeliest tokens beside each sampled one.
    """

    cache: ModelState
    token: Int[Array, "batch"]
    num_sampled: Int[Array, "batch"]
    stopped: Bool[Array, "batch"]
    seen: Bool[Array, "batch vocab"]
    counts: Int[Array, "batch vocab"]
    bias: Float[Array, "batch vocab"]
    alternatives: Bool[Array, "batch"]
    sampler: Sampler
    stop: StopCriteria


class Prefilled(NamedTuple):
    """A batch of prefilled prompts.

    Attributes:
      last_hidden: the last layer's output at the last token of each row.
    """

    cache: ModelState
    last_hidden: Float[Array, "batch hidden"]


class TokenScores(NamedTuple):
    """How likely each token of a sequence but the first is, given those before it.

    Attributes:
      log_probs: NaN where the model's logits are not all finite.
      is_likeliest: whether no token has a larger logit; of several such, it is the first.
      top_tokens, top_log_probs: the MAX_ALTERNATIVES likeliest tokens, the likeliest first; zeros
        unless they are asked for.
    """

    log_probs: Float[np.ndarray, " targets"]
    is_likeliest: Bool[np.ndarray, " targets"]
    top_tokens: Int[np.ndarray, "targets alternatives"]
    top_log_probs: Float[np.ndarray, "targets alternatives"]


class ChunkScores(NamedTuple):
    """`TokenScores` of one chunk of each sequence of a batch, on the device."""

    log_probs: Float[Array, "batch length"]
    is_likeliest: Bool[Array, "batch length"]
    top_tokens: Int[Array, "batch length alternatives"]
    top_log_probs: Float[Array, "batch length alternatives"]


class PaddedChunk(NamedTuple):
    """A chunk of each prompt of a batch, padded on the right."""

    tokens: Int[np.ndarray | Array, "batch length"]
    lengths: Int[np.ndarray | Array, "batch"]


class Engine:
    """A model's parameters on the device, and the programs that prefill and decode with them.

    Args:
      model: its adapters are merged, and its projections fused for decoding (`fuse_projections`).
      state_dtype: that SSM states are stored in between tokens.
      weights: of matmuls, "float" as the model has them or "int8".
      kv_cache: format of keys and values between tokens, "float" in the model's dtype or "int8"
        with a scale for each head of each token.
      context: tokens of every sequence's cache; as many as each batch needs if absent.
      max_chunk: tokens of a prompt that are prefilled at once, which bounds the memory of prefill.
      allowed: the tokens that may be sampled; all of them if absent.

    Attributes:
      max_context: tokens that a sequence may have.
      programs: the compiled programs, for warm-up and tests.

    Raises:
      HymbaError: the model does not support the context.
    """

    def __init__(
        self,
        model: Hymba,
        *,
        state_dtype: DType = "float32",
        weights: WeightFormat = "float",
        kv_cache: CacheFormat = "float",
        context: int | None = None,
        max_chunk: int = MAX_CHUNK,
        allowed: Bool[np.ndarray, "vocab"] | None = None,
    ):
        for name, value, formats in (
            ("weights", weights, get_args(WeightFormat)),
            ("kv_cache", kv_cache, get_args(CacheFormat)),
        ):
            if value not in formats:
                raise HymbaError(f"{name} is {value!r}, not one of {', '.join(formats)}")
        fused = fuse_projections(merge_adapters(unstack_layers(model)))
        if weights == "int8":
            quantize_kernels(fused)
        graph, variables = nnx.split(fused)
        self.config = model.config
        self.dtype = model.compute.dtype
        self.params: Params = nnx.to_pure_dict(variables)
        self.max_chunk = max_chunk
        self.allowed = jnp.asarray(
            np.ones(self.config.num_embeddings, bool) if allowed is None else allowed
        )
        self.max_context = _max_context(model.config, context)
        self._smallest_context = context or MIN_CONTEXT
        self.state_dtype, self.kv_cache = state_dtype, kv_cache
        self.programs = _programs(graph, model.config, model.compute, state_dtype, kv_cache)

    def on_device(self, device: jax.Device) -> "Engine":
        """This engine if its parameters are on that device, else one with a copy of them there."""
        if self._devices() == {device}:
            return self
        replica = copy.copy(self)
        replica.params, replica.allowed = jax.device_put((self.params, self.allowed), device)
        vars(replica).pop("meta_state", None)
        return replica

    @functools.cached_property
    def meta_state(self) -> MetaState:
        """The state after the meta tokens, computed once."""
        return self.programs.meta_state(self.params)

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def device(self) -> jax.Device:
        """The device that holds the parameters, or one of them."""
        return next(iter(self._devices()))

    @property
    def device_description(self) -> str:
        """The devices that hold the parameters, in words."""
        devices = self._devices()
        kind = min(devices, key=lambda device: device.id).device_kind
        return kind if len(devices) == 1 else f"{len(devices)} x {kind}"

    def row_bytes(self, context: int) -> int:
        """Bytes of one sequence's cache of so many tokens."""
        _, context = self._sizes(1, context)
        sizes = cache_bytes(self.config, context, self.dtype, self.state_dtype, self.kv_cache)
        return sum(sizes.values())

    def memory_bytes(self, rows: int, context: int, prefilled: int = 0) -> int:
        """Bytes of the parameters, and of states.

        Args:
          rows: sequences at the same time.
          context: tokens that the longest may grow to.
          prefilled: prompts whose states are there besides.
        """
        rows, context = self._sizes(rows, context)
        return (
            tree_bytes(self.params)
            + sum(meta_state_bytes(self.config, self.dtype).values())
            + (rows + prefilled) * self.row_bytes(context)
            + rows * self.config.num_embeddings * VOCAB_BYTES
        )

    def check_memory(
        self,
        rows: int,
        context: int,
        prefilled: int = 0,
        others: int = 0,
        advice: str = "reduce batch_size, context or max_new_tokens",
    ) -> None:
        """Refuses what the device cannot hold, before anything is allocated for it.

        Args:
          rows, context, prefilled: as of `memory_bytes`.
          others: bytes that other models take on the device.
          advice: what to do if they do not fit.

        Raises:
          HymbaError: parameters and states together are larger than its memory.
        """
        size = self.memory_bytes(rows, context, prefilled) + others
        rows, context = self._sizes(rows, context)
        beside = "the parameters and states of other models" if others else "the model's parameters"
        check_fits(
            f"{rows} sequences of {context} tokens beside {beside}",
            size,
            [*self._devices()],
            advice,
        )

    def init_state(
        self, rows: int, context: int, max_stop_tokens: int = MIN_STOP_TOKENS
    ) -> DecodeState:
        """A running batch of rows that have all stopped, to insert requests into.

        Args:
          context: tokens that the longest sequence may grow to.
          max_stop_tokens: of a request; the programs of one with more are compiled anew.
        """
        rows, context = self._sizes(rows, context)
        return self.programs.init_state(
            self.params, self.meta_state, rows, context, bucket(max_stop_tokens, MIN_STOP_TOKENS)
        )

    def init_prefill(self, rows: int, context: int) -> Prefilled:
        """A batch of empty prompts, padded to a bucket."""
        return self.programs.init_prefill(self.params, self.meta_state, *self._sizes(rows, context))

    def prefill(self, prompts: Sequence[Sequence[int]], context: int) -> Prefilled:
        """Prefills prompts; the batch is padded to a bucket with empty ones.

        Args:
          context: tokens that the longest sequence may grow to.
        """
        state = self.init_prefill(len(prompts), context)
        for i, chunk in enumerate(self.chunks(prompts)):
            state = self.prefill_chunk(state, chunk, is_start=i == 0)
        return state

    def prefill_chunk(
        self, prefilled: Prefilled, chunk: PaddedChunk, *, is_start: bool
    ) -> Prefilled:
        """What was prefilled with one more chunk of each prompt.

        Args:
          prefilled: donated.
          is_start: nothing was prefilled before this chunk.
        """
        return self.programs.prefill(
            self.params, self.meta_state, prefilled, chunk, is_start=is_start
        )[0]

    def score_chunk(
        self,
        prefilled: Prefilled,
        chunk: PaddedChunk,
        targets: Int[np.ndarray, "batch length"],
        *,
        is_start: bool,
        alternatives: bool = False,
    ) -> tuple[Prefilled, ChunkScores]:
        """As `prefill_chunk`, and how likely each target is after the token at its place.

        Args:
          alternatives: whether the likeliest tokens are asked for, too.
        """
        prefilled, hidden = self.programs.prefill(
            self.params, self.meta_state, prefilled, chunk, is_start=is_start
        )
        return prefilled, self.programs.score(self.params, hidden, targets, alternatives)

    def repeat(self, prefilled: Prefilled, rows: Sequence[int]) -> Prefilled:
        """These rows of what was prefilled, in this order, padded to a bucket."""
        order = np.zeros(bucket(len(rows)), np.int32)
        order[: len(rows)] = rows
        return self.programs.repeat(prefilled, order)

    def insert(
        self,
        prefilled: Prefilled,
        requests: Sequence[Request],
        state: DecodeState | None = None,
        rows: Sequence[int] = (),
    ) -> tuple[DecodeState, SampledTokens]:
        """Samples the first token of each request: a new batch, or rows that join a running one.

        Args:
          prefilled: row i of it is for request i; further rows are padding. Donated.
          state: the running batch, whose cache has the same context. Donated.
          rows: of the running batch, one for each request; what they held is replaced.

        Returns:
          The running batch, and the first token of each row of `prefilled`.
        """
        batch = len(prefilled.last_hidden)
        padding = batch - len(requests)
        empty_request = Request((), SamplingConfig(), 0, 0)
        padded = [*requests, *[empty_request] * padding]
        sampler = make_sampler(
            [request.sampling for request in padded], [request.sample for request in padded]
        )
        num_stops = max(len(request.stop_tokens) for request in padded)
        num_stops = bucket(num_stops, MIN_STOP_TOKENS)
        if state is not None:
            num_stops = max(num_stops, state.stop.stop_tokens.shape[1])
        stops = np.full((batch, num_stops), NO_TOKEN, np.int32)
        seen = np.zeros((batch, self.config.num_embeddings), bool)
        bias = np.stack([request.bias(self.config.num_embeddings) for request in padded])
        for i, request in enumerate(padded):
            stops[i, : len(request.stop_tokens)] = request.stop_tokens
            seen[i, list(request.prompt)] = True
        alternatives = np.array([request.alternatives for request in padded])
        max_new_tokens = np.array([request.max_new_tokens for request in padded], np.int32)
        stop = StopCriteria(jnp.asarray(max_new_tokens), jnp.asarray(stops))
        new, sampled = self.programs.sample_first(
            self.params, self.allowed, *prefilled, sampler, stop, seen, bias, alternatives
        )
        if state is None:
            return new, sampled
        wider = num_stops - state.stop.stop_tokens.shape[1]
        if wider:
            known = jnp.pad(state.stop.stop_tokens, ((0, 0), (0, wider)), constant_values=NO_TOKEN)
            state = state._replace(stop=state.stop._replace(stop_tokens=known))
        target_rows = np.full(batch, len(state.token), np.int32)  # padding has none
        target_rows[: len(requests)] = rows
        return self.programs.insert(state, new, target_rows), sampled

    def decode(
        self, state: DecodeState, steps: int = DECODE_STEPS
    ) -> tuple[DecodeState, SampledTokens]:
        """Samples up to `steps` more tokens for every row, fewer if all rows stop."""
        return self.programs.decode(self.params, self.meta_state, self.allowed, state, steps)

    def verify(self, state: DecodeState, draft: Sequence[int]) -> tuple[DecodeState, SampledTokens]:
        """Samples the next token, and one more for each drafted token that is what was sampled.

        They are those of `decode`, to the rounding of matmuls of several tokens.

        Args:
          state: of one row. Donated.
          draft: what the next tokens may be, at most MAX_DRAFT.
        """
        padded = np.zeros(MAX_DRAFT, np.int32)
        padded[: len(draft)] = draft
        return self.programs.verify(
            self.params, self.meta_state, self.allowed, state, padded, len(draft)
        )

    def stop(self, state: DecodeState, rows: Sequence[int]) -> DecodeState:
        """The batch with these rows stopped, which then take no part in decoding."""
        stopped = np.array(state.stopped)
        stopped[list(rows)] = True
        return state._replace(stopped=jnp.asarray(stopped))

    def set_bias(
        self, state: DecodeState, biases: Mapping[int, Float[np.ndarray, "vocab"]]
    ) -> DecodeState:
        """The batch with what is added to the logits of these rows replaced.

        Args:
          state: donated.
        """
        rows = np.full(len(state.token), len(state.token), np.int32)  # padding is no row
        rows[: len(biases)] = [*biases]
        values = np.zeros((len(rows), self.config.num_embeddings), np.float32)
        for i, bias in enumerate(biases.values()):
            values[i] = bias
        return self.programs.set_bias(state, rows, values)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
        """How likely each token of each sequence but the first is, given those before it."""
        state = self.init_prefill(len(sequences), max(map(len, sequences)) - 1)
        scores: list[list[TokenScores]] = [[] for _ in sequences]
        inputs = self.chunks([sequence[:-1] for sequence in sequences])
        targets = self.chunks([sequence[1:] for sequence in sequences])
        for i, (chunk, next_chunk) in enumerate(zip(inputs, targets, strict=True)):
            next_tokens = np.asarray(next_chunk.tokens)
            state, chunk_scores = self.score_chunk(state, chunk, next_tokens, is_start=i == 0)
            arrays = jax.device_get(chunk_scores)
            for row, length, *values in zip(scores, chunk.lengths, *arrays, strict=False):
                row.append(TokenScores(*(value[:length] for value in values)))
        return [TokenScores(*map(np.concatenate, zip(*row, strict=True))) for row in scores]

    def chunks(self, prompts: Sequence[Sequence[int]]) -> list[PaddedChunk]:
        """The prompts in chunks of at most `max_chunk` tokens."""
        lengths = np.zeros(bucket(len(prompts)), np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        chunks: list[PaddedChunk] = []
        start, longest = 0, int(lengths.max())
        while start < longest or not chunks:
            width = min(bucket(longest - start, MIN_CHUNK), self.max_chunk)
            tokens = np.zeros((len(lengths), width), np.int32)
            for row, prompt in zip(tokens, prompts, strict=False):
                chunk = prompt[start : start + width]
                row[: len(chunk)] = chunk
            chunks.append(PaddedChunk(tokens, np.clip(lengths - start, 0, width)))
            start += width
        return chunks

    def _devices(self) -> set[jax.Device]:
        return jax.tree.leaves(self.params)[0].devices()

    def _sizes(self, rows: int, context: int) -> tuple[int, int]:
        """Rows of a batch and tokens of its cache, as they are compiled for."""
        return bucket(rows), min(bucket(context, self._smallest_context), self.max_context)


def bucket(size: int, smallest: int = 1) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


def _max_context(config: HymbaConfig, context: int | None) -> int:
    """Tokens that a sequence may have.

    With a length-dependent base, growing rotates all keys again, so that no cache equals the full
    forward pass beyond this.
    """
    largest, reason = config.max_positions, "max_positions"
    fixed = max_fixed_positions(config) - config.num_meta_tokens
    if fixed < largest:
        largest, reason = int(fixed), "dynamic_ntk rotates all keys again beyond that"
    wanted = largest if context is None else context
    if not 1 <= wanted <= largest:
        raise HymbaError(
            f"a context of {shown(wanted)} tokens: the model's is 1 to {largest} ({reason})"
        )
    return wanted


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
    set_bias: Callable[..., DecodeState]
    decode: Callable[..., tuple[DecodeState, SampledTokens]]
    verify: Callable[..., tuple[DecodeState, SampledTokens]]


@functools.lru_cache(maxsize=8)
def _programs(
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
        set_bias=jax.jit(set_bias, donate_argnames="state"),
        decode=jax.jit(decode, donate_argnames="state"),
        verify=jax.jit(verify, donate_argnames="state"),
    )
