"""The compiled side of inference: texts go in as tokens, and go on as tokens.

    prefill   a batch of texts, in pieces, each starting from the state after the meta tokens
    decode    one loop on the device, a token for every row at a time, until all rows have stopped

A program is compiled once for each shape; shapes are rounded up (`bucket`), so they are few.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.config import ComputeConfig, DType, HymbaConfig
from hymba_jax.errors import HymbaError
from hymba_jax.field_types import shown
from hymba_jax.inference.memory import cache_bytes, check_fits, meta_state_bytes, tree_bytes
from hymba_jax.inference.sampling import Sampler, sample
from hymba_jax.model import Hymba, arrange_layers, fuse_projections
from hymba_jax.model.state import MetaState, ModelState
from hymba_jax.training.state import Params
from hymba_jax.types import Array, Bool, Float, Int

SMALLEST_PIECE = 32
LARGEST_PIECE = 1024
SMALLEST_CONTEXT = 256
STEPS = 16  # tokens that a row draws at most before they are looked at
NO_TOKEN = -1
NOT_FINITE = -2  # in place of a token, where the model's logits are NaN or infinite
LOGIT_POSITIONS = 128  # positions whose logits are in memory at once


class Limits(NamedTuple):
    """When rows stop: after so many tokens, or at one of these (NO_TOKEN fills up)."""

    max_new_tokens: Int[Array, "batch"]
    stop_tokens: Int[Array, "batch stop_tokens"]


class Drawn(NamedTuple):
    """Tokens by row and step with their log-probabilities.

    NO_TOKEN where a row has stopped, NOT_FINITE where it stops because nothing can be sampled.
    """

    tokens: Int[Array, "batch steps"]
    log_probs: Float[Array, "batch steps"]


class DecodeState(NamedTuple):
    """A batch of texts that are being continued.

    Attributes:
      token: the newest of each row, which is not in the cache yet.
      num_drawn: tokens drawn so far.
      stopped: the row has come to its end; its part of the cache no longer changes.
      seen: the tokens in each text, for the repetition penalty.
    """

    cache: ModelState
    token: Int[Array, "batch"]
    num_drawn: Int[Array, "batch"]
    stopped: Bool[Array, "batch"]
    seen: Bool[Array, "batch vocab"]


class Prefilled(NamedTuple):
    """A batch of texts that have been read.

    Attributes:
      last: the last layer's output at the last token of each row.
    """

    cache: ModelState
    last: Float[Array, "batch hidden"]


class Columns(NamedTuple):
    """A piece of each text of a batch; rows are padded behind their end."""

    tokens: Int[np.ndarray | Array, "batch length"]
    lengths: Int[np.ndarray | Array, "batch"]


class Engine:
    """A model's parameters on the device, and the programs that read and continue texts.

    Args:
      model: its kernels are copied into the form that is read fastest a token at a time.
      state_dtype: that the SSM's states are kept in between tokens.
      context: tokens of every text's cache; as many as each batch needs if absent.
      largest_piece: tokens of a text that are read at once, which bounds the memory of reading.
      allowed: the tokens that may be sampled; all of them if absent.

    Attributes:
      max_context: tokens that a text may have.

    Raises:
      HymbaError: the context is none that the model has.
    """

    def __init__(
        self,
        model: Hymba,
        *,
        state_dtype: DType = "float32",
        context: int | None = None,
        largest_piece: int = LARGEST_PIECE,
        allowed: Bool[np.ndarray, "vocab"] | None = None,
    ):
        graph, variables = nnx.split(fuse_projections(arrange_layers(model, scan_layers=False)))
        self.config = model.config
        self.dtype = model.compute.dtype
        self.params: Params = nnx.to_pure_dict(variables)
        self.largest_piece = largest_piece
        self.allowed = jnp.asarray(
            np.ones(self.config.num_embeddings, bool) if allowed is None else allowed
        )
        self.max_context = _max_context(model.config, context)
        self._smallest_context = context or SMALLEST_CONTEXT
        self._state_dtype = state_dtype
        self._programs = _programs(graph, model.config, model.compute, state_dtype)

    @functools.cached_property
    def meta_state(self) -> MetaState:
        """The state after the meta tokens, computed once."""
        return self._programs.meta_state(self.params)

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def place(self) -> str:
        """The devices that hold the parameters, in words."""
        devices = self._devices()
        kind = min(devices, key=lambda device: device.id).device_kind
        return kind if len(devices) == 1 else f"{len(devices)} x {kind}"

    def check_memory(self, rows: int, context: int) -> None:
        """Refuses what the device cannot hold, before anything is allocated for it.

        Args:
          rows: sequences at the same time.
          context: tokens that the longest may grow to.

        Raises:
          HymbaError: parameters and caches together are larger than its memory.
        """
        rows, context = bucket(rows), self._cache_length(context)
        cache = cache_bytes(self.config, context, self.dtype, self._state_dtype).total
        check_fits(
            f"{rows} sequences of {context} tokens beside the model's parameters",
            tree_bytes(self.params)
            + meta_state_bytes(self.config, self.dtype).total
            + rows * cache,
            self._devices(),
            "reduce batch_size, context or max_new_tokens",
        )

    def prefill(self, texts: Sequence[Sequence[int]], context: int) -> Prefilled:
        """Reads texts; the batch is filled up to a bucket with empty ones.

        Args:
          context: tokens that the longest text may grow to.
        """
        state = self._start(len(texts), context)
        for i, piece in enumerate(self._pieces(texts)):
            state = self._programs.read(self.params, self.meta_state, state, piece, is_start=i == 0)
        return state

    def repeat(self, read: Prefilled, rows: Sequence[int]) -> Prefilled:
        """These rows of what has been read, in this order, filled up to a bucket."""
        order = np.zeros(bucket(len(rows)), np.int32)
        order[: len(rows)] = rows
        return self._programs.repeat(read, order)

    def score(self, texts: Sequence[Sequence[int]]) -> list[Float[np.ndarray, " targets"]]:
        """The log-probability of each token but the first, given those before it.

        NaN where the model's logits are not all finite.
        """
        state = self._start(len(texts), max(map(len, texts)))
        scores: list[list[np.ndarray]] = [[] for _ in texts]
        inputs = self._pieces([text[:-1] for text in texts])
        targets = self._pieces([text[1:] for text in texts])
        for i, (piece, next_piece) in enumerate(zip(inputs, targets, strict=True)):
            state, log_probs = self._programs.score(
                self.params, self.meta_state, state, piece, next_piece.tokens, is_start=i == 0
            )
            for row, length, values in zip(
                scores, piece.lengths, np.asarray(log_probs), strict=False
            ):
                row.append(values[:length])
        return [np.concatenate(row) for row in scores]

    def first(
        self,
        read: Prefilled,
        sampler: Sampler,
        limits: Limits,
        seen: Bool[Array, "batch vocab"],
    ) -> tuple[DecodeState, Drawn]:
        """Draws the first token of each row."""
        return self._programs.first(
            self.params, self.allowed, read.cache, read.last, sampler, limits, seen
        )

    def decode(
        self, state: DecodeState, sampler: Sampler, limits: Limits, steps: int = STEPS
    ) -> tuple[DecodeState, Drawn]:
        """Draws up to `steps` more tokens for every row, fewer if all rows stop."""
        return self._programs.decode(
            self.params, self.meta_state, self.allowed, state, sampler, limits, steps
        )

    def _devices(self) -> set[jax.Device]:
        return jax.tree.leaves(self.params)[0].devices()

    def _cache_length(self, context: int) -> int:
        return min(bucket(context, self._smallest_context), self.max_context)

    def _start(self, rows: int, context: int) -> Prefilled:
        context = self._cache_length(context)
        return self._programs.start(
            self.params, self.meta_state, batch=bucket(rows), context=context
        )

    def _pieces(self, texts: Sequence[Sequence[int]]) -> list[Columns]:
        """The texts cut into columns of at most `largest_piece` tokens."""
        lengths = np.zeros(bucket(len(texts)), np.int32)
        lengths[: len(texts)] = [len(text) for text in texts]
        pieces: list[Columns] = []
        start, longest = 0, int(lengths.max())
        while start < longest or not pieces:
            width = min(bucket(longest - start, SMALLEST_PIECE), self.largest_piece)
            tokens = np.zeros((len(lengths), width), np.int32)
            for row, text in zip(tokens, texts, strict=False):
                part = text[start : start + width]
                row[: len(part)] = part
            pieces.append(Columns(tokens, np.clip(lengths - start, 0, width)))
            start += width
        return pieces


def bucket(size: int, smallest: int = 1) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


def _max_context(config: HymbaConfig, context: int | None) -> int:
    """Tokens that a text may have.

    A base that follows the length of the text turns every key again when it grows, so that no
    cache can equal the full forward pass from there on.
    """
    largest, reason = config.max_positions, "max_positions"
    if config.attention.rope_type == "dynamic_ntk":
        steady = config.attention.rope_original_positions - config.num_meta_tokens
        if steady < largest:
            largest, reason = steady, "dynamic_ntk turns all keys again beyond that"
    wanted = largest if context is None else context
    if not 1 <= wanted <= largest:
        raise HymbaError(
            f"a context of {shown(wanted)} tokens: the model's is 1 to {largest} ({reason})"
        )
    return wanted


class _Programs(NamedTuple):
    meta_state: Callable[..., MetaState]
    start: Callable[..., Prefilled]
    read: Callable[..., Prefilled]
    repeat: Callable[..., Prefilled]
    score: Callable[..., tuple[Prefilled, Array]]
    first: Callable[..., tuple[DecodeState, Drawn]]
    decode: Callable[..., tuple[DecodeState, Drawn]]


@functools.lru_cache(maxsize=8)
def _programs(
    graph: nnx.GraphDef[Hymba], config: HymbaConfig, compute: ComputeConfig, state_dtype: DType
) -> _Programs:
    """The programs of a model, compiled as their shapes come; large arguments are reused."""

    def meta_state(params: Params) -> MetaState:
        return nnx.merge(graph, params).meta_state()

    def start(params: Params, meta: MetaState, batch: int, context: int) -> Prefilled:
        cache = nnx.merge(graph, params).init_state(batch, context, state_dtype).start(meta)
        return Prefilled(cache, jnp.zeros((batch, config.hidden_size), compute.dtype))

    def extend(
        params: Params, meta: MetaState, state: Prefilled, piece: Columns, is_start: bool
    ) -> tuple[Array, Prefilled]:
        model = nnx.merge(graph, params)
        tokens, lengths = (jnp.asarray(a) for a in piece)
        x, cache = model.extend(tokens, state.cache, meta, lengths, is_start=is_start)
        newest = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        return x, Prefilled(cache, jnp.where(lengths[:, None] > 0, newest, state.last))

    def read(
        params: Params, meta: MetaState, state: Prefilled, piece: Columns, is_start: bool
    ) -> Prefilled:
        return extend(params, meta, state, piece, is_start)[1]

    def score(
        params: Params,
        meta: MetaState,
        state: Prefilled,
        piece: Columns,
        targets: Int[Array, "batch length"],
        is_start: bool,
    ) -> tuple[Prefilled, Float[Array, "batch length"]]:
        model = nnx.merge(graph, params)
        x, state = extend(params, meta, state, piece, is_start)

        def log_probs(part: slice) -> Array:
            logits = model.logits(x[:, part])
            log_probs = jax.nn.log_softmax(logits)
            log_probs = jnp.take_along_axis(log_probs, targets[:, part, None], axis=-1)[:, :, 0]
            return jnp.where(jnp.isfinite(logits).all(-1), log_probs, jnp.nan)

        starts = range(0, x.shape[1], LOGIT_POSITIONS)
        parts = [log_probs(slice(start, start + LOGIT_POSITIONS)) for start in starts]
        return state, jnp.concatenate(parts, axis=1)

    def advance(
        params: Params,
        allowed: Bool[Array, "vocab"],
        state: DecodeState,
        last: Array,
        sampler: Sampler,
        limits: Limits,
    ) -> tuple[DecodeState, Drawn]:
        """Samples a token for each row that has not stopped."""
        logits = nnx.merge(graph, params).logits(last[:, None])[:, 0]
        finite = jnp.isfinite(logits).all(1)
        token, log_probs = sample(logits, state.seen, state.cache.lengths, sampler, allowed)
        ends = (token[:, None] == limits.stop_tokens).any(1) | ~finite
        result = jnp.where(finite, jnp.where(ends, NO_TOKEN, token), NOT_FINITE)
        drawn = Drawn(jnp.where(state.stopped, NO_TOKEN, result), log_probs)
        num_drawn = state.num_drawn + ~state.stopped
        rows = jnp.arange(len(token))
        state = DecodeState(
            cache=state.cache,
            token=token,
            num_drawn=num_drawn,
            stopped=state.stopped | ends | (num_drawn >= limits.max_new_tokens),
            seen=state.seen.at[rows, token].set(True),
        )
        return state, drawn

    def first(
        params: Params,
        allowed: Bool[Array, "vocab"],
        cache: ModelState,
        last: Float[Array, "batch hidden"],
        sampler: Sampler,
        limits: Limits,
        seen: Bool[Array, "batch vocab"],
    ) -> tuple[DecodeState, Drawn]:
        zeros = jnp.zeros(len(seen), jnp.int32)
        state = DecodeState(cache, zeros, zeros, limits.max_new_tokens < 1, seen)
        state, drawn = advance(params, allowed, state, last, sampler, limits)
        return state, Drawn(drawn.tokens[:, None], drawn.log_probs[:, None])

    def decode(
        params: Params,
        meta: MetaState,
        allowed: Bool[Array, "vocab"],
        state: DecodeState,
        sampler: Sampler,
        limits: Limits,
        steps: Int[Array, ""],
    ) -> tuple[DecodeState, Drawn]:
        model = nnx.merge(graph, params)
        shape = (len(state.token), STEPS)
        nothing = Drawn(jnp.full(shape, NO_TOKEN), jnp.zeros(shape))

        def goes_on(loop: tuple[Array, DecodeState, Drawn]) -> Array:
            step, state, _ = loop
            return (step < steps) & ~state.stopped.all()

        def body(loop: tuple[Array, DecodeState, Drawn]) -> tuple[Array, DecodeState, Drawn]:
            step, state, drawn = loop
            counts = (~state.stopped).astype(jnp.int32)
            x, cache = model.extend(state.token[:, None], state.cache, meta, counts)
            state = state._replace(cache=cache)
            state, new = advance(params, allowed, state, x[:, 0], sampler, limits)
            drawn = Drawn(*(all.at[:, step].set(a) for all, a in zip(drawn, new, strict=True)))
            return step + 1, state, drawn

        _, state, drawn = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, nothing))
        return state, drawn

    return _Programs(
        meta_state=jax.jit(meta_state),
        start=jax.jit(start, static_argnames=("batch", "context")),
        read=jax.jit(read, static_argnames="is_start", donate_argnames="state"),
        repeat=jax.jit(lambda read, order: jax.tree.map(lambda a: a[order], read)),
        score=jax.jit(score, static_argnames="is_start", donate_argnames="state"),
        first=jax.jit(first, donate_argnames="cache"),
        decode=jax.jit(decode, donate_argnames="state"),
    )
