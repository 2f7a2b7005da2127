"""The compiled side of inference: prompts go in as tokens, completions come out as tokens.

    prefill   a batch of prompts, in chunks, each starting from the state after the meta tokens
    insert    requests for what was prefilled: a new batch, or rows of one that is running
    decode    one loop on the device, a token for every row at a time, until all rows have stopped
    verify    one row by several drafted tokens at once, as many as are what is sampled

A program is compiled once for each shape; shapes are rounded up (`bucket`), so they are few.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.config import CacheFormat, DType, HymbaConfig, WeightFormat
from hymba_jax.config.field_types import shown
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.batch_state import (
    NO_TOKEN,
    ChunkScores,
    DecodeState,
    PaddedChunk,
    Prefilled,
    Request,
    SampledTokens,
    StopCriteria,
    TokenScores,
)
from hymba_jax.inference.memory import cache_bytes, meta_state_bytes
from hymba_jax.inference.programs import DECODE_STEPS, MIN_STOP_TOKENS, make_programs
from hymba_jax.inference.sampling import make_sampler
from hymba_jax.model import Hymba, fuse_projections, merge_adapters, unstack_layers
from hymba_jax.model.abstract import Params
from hymba_jax.model.quantized import quantize_kernels
from hymba_jax.model.state import MetaState
from hymba_jax.parallel.memory import check_fits, tree_bytes
from hymba_jax.types import Bool, Float, Int

MIN_CHUNK = 32
MAX_CHUNK = 1024
MIN_CONTEXT = 256
MAX_DRAFT = 15  # drafted tokens that are verified at once
VOCAB_BYTES = 1 + 4 + 4  # of seen, counts and bias, for each row and token of the vocabulary


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
      num_params: parameters of the model, in whatever format.
      max_context: tokens that a sequence may have.
      programs: the compiled programs, for warm-up and tests.

    Raises:
      HymbaError: the model does not support the context, or there is no such format.
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
            ("state_dtype", state_dtype, get_args(DType)),
            ("weights", weights, get_args(WeightFormat)),
            ("kv_cache", kv_cache, get_args(CacheFormat)),
        ):
            if value not in formats:
                raise HymbaError(f"{name} is {value!r}, not one of {', '.join(formats)}")
        fused = fuse_projections(merge_adapters(unstack_layers(model)))
        # Counted here: quantized kernels have scales, and a tied embedding is there twice.
        self.num_params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(fused)))
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
        self.state_dtype, self.weights, self.kv_cache = state_dtype, weights, kv_cache
        self.programs = make_programs(graph, model.config, model.compute, state_dtype, kv_cache)

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
        stopped = np.zeros(len(state.stopped), bool)
        stopped[list(rows)] = True
        return state._replace(stopped=self.programs.stop(state.stopped, stopped))

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
    fixed = config.max_fixed_positions - config.num_meta_tokens
    if fixed < largest:
        largest, reason = int(fixed), "dynamic_ntk rotates all keys again beyond that"
    wanted = largest if context is None else context
    if not 1 <= wanted <= largest:
        raise HymbaError(
            f"a context of {shown(wanted)} tokens: the model's is 1 to {largest} ({reason})"
        )
    return wanted
