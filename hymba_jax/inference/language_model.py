"""Text in, text out: a model with its tokenizer."""

import copy
import dataclasses
import difflib
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from hymba_jax.config import CacheFormat, DType, WeightFormat
from hymba_jax.config.field_types import fits, misfit, shown
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.batch_state import DecodeState, Request, SampledTokens
from hymba_jax.inference.completion_stream import (
    CompletionStream,
    Delta,
    FinishReason,
    check_finite,
)
from hymba_jax.inference.engine import MAX_CHUNK, MAX_DRAFT, Engine
from hymba_jax.inference.generation_config import GenerationDefaults
from hymba_jax.inference.prefix_cache import PrefixCache
from hymba_jax.inference.programs import DECODE_STEPS
from hymba_jax.inference.prompt_lookup import PromptLookup
from hymba_jax.inference.prompts import Prompts, encode_prompts, prompt_name
from hymba_jax.model import Hymba
from hymba_jax.tokenizer import Tokenizer, chat_template
from hymba_jax.types import Bool, Float

_LOAD_OPTIONS = {
    *("dtype", "state_dtype", "weights", "kv_cache", "batch_size", "context", "max_chunk"),
    *("speculate", "prefix_states", "step", "adapter"),
}
PREFIX_CHUNK = 64  # tokens of a prompt that are prefilled at once, where states are kept after them


@dataclass
class Completion:
    """One completion of one prompt.

    Attributes:
      index: of the prompt.
      sample: which of its completions.
      text: up to a stop string.
      tokens: without a stop token, and up to a stop string: a token whose text begins before it is
        there, even if it ends inside; one whose text is wholly in it or behind it is not.
      log_probs: natural, one for each of `tokens`, in the model's own distribution over its whole
        vocabulary: before temperature, filters and the repetition penalty, and with the tokens
        that the tokenizer lacks, which are never sampled.
      finish_reason: "stop" at the end-of-sequence token, a stop token or a stop string; "length"
        after `max_new_tokens`, or fewer where the model's context ends.
      context_full: the context ended it, before `max_new_tokens`.
    """

    index: int
    sample: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    context_full: bool = False


class LanguageModel:
    """A model that generates completions of prompts, many at a time.

    A completion depends on its prompt and its seed, never on the prompts beside it. Tokens that
    the tokenizer lacks are never sampled, though the model's vocabulary may be larger.

    Args:
      state_dtype: that SSM states are stored in; they are computed in float32.
      weights: of matmuls, "float" as the model has them or "int8".
      kv_cache: format of keys and values between tokens, "float" in the model's dtype or "int8".
      batch_size: sequences that are decoded at the same time.
      context: tokens of every sequence's cache; as many as each batch needs if absent.
      max_chunk: tokens of a prompt that are prefilled at once; 1024 if absent, and 64 with
        `prefix_states`.
      speculate: whether a sequence that is decoded alone is drafted from earlier tokens of its own
        (`PromptLookup`). Its tokens are the same, to the rounding of matmuls of several tokens and,
        with `state_dtype` "bfloat16", of states, once for all of these tokens.
      prefix_states: states after beginnings of prompts that are kept, each as large as a sequence's
        cache, so that the turns of a conversation are not prefilled again (`PrefixCache`). They are
        after whole chunks, and for caches of one size: give `context`, too, or they are dropped
        when a longer sequence needs a larger one.
      defaults: additional end tokens, and sampling defaults.

    Raises:
      HymbaError: an option is invalid, or the model does not fit into the device's memory.
    """

    def __init__(
        self,
        model: Hymba,
        tokenizer: Tokenizer,
        *,
        state_dtype: DType = "float32",
        weights: WeightFormat = "float",
        kv_cache: CacheFormat = "float",
        batch_size: int = 8,
        context: int | None = None,
        max_chunk: int | None = None,
        speculate: bool = False,
        prefix_states: int = 0,
        defaults: GenerationDefaults | None = None,
    ):
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.prefix_states = _at_least(0, "prefix_states", prefix_states)
        if max_chunk is None:
            max_chunk = PREFIX_CHUNK if prefix_states else MAX_CHUNK
        if problem := misfit(speculate, bool):
            raise HymbaError(f"speculate {problem}")
        self.config = model.config
        self.tokenizer = tokenizer
        self._in_tokenizer = _tokens_in_tokenizer(tokenizer, model.config.num_embeddings)
        self.engine = Engine(
            model,
            state_dtype=state_dtype,
            weights=weights,
            kv_cache=kv_cache,
            context=None if context is None else _as_int("context", context),
            max_chunk=_at_least(1, "max_chunk", max_chunk),
            allowed=self._in_tokenizer,
        )
        self.speculate = speculate
        self._prefix_cache: tuple[int, PrefixCache] | None = None
        self.defaults = defaults or GenerationDefaults()
        if context is not None:
            self.engine.check_memory(1, context)

    def __repr__(self) -> str:
        config, engine = self.config, self.engine
        formats = {"weights": engine.weights, "kv_cache": engine.kv_cache}
        int8 = "".join(f", {name} int8" for name, format in formats.items() if format == "int8")
        return (
            f"LanguageModel({engine.num_params:,} parameters in {engine.dtype} on "
            f"{engine.device_description}, {config.num_layers} layers, "
            f"context {engine.max_context}, vocabulary {config.num_embeddings}, "
            f"batch_size {self.batch_size}{int8})"
        )

    def on_device(self, device: jax.Device) -> "LanguageModel":
        """This model if its parameters are on that device, else one with a copy of them there."""
        engine = self.engine.on_device(device)
        if engine is self.engine:
            return self
        replica = copy.copy(self)
        replica.engine = engine
        replica._prefix_cache = None  # whose states are on the other device
        return replica

    def generate(
        self,
        prompts: Prompts,
        config: SamplingConfig | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Completions of every prompt: `num_samples` of the first, then of the second, ...

        Args:
          prompts: a string, or any iterable of strings and of token sequences.
          config: how to sample; if absent, and if `sampling` has no such field, as the model's
            `defaults` say, which is greedy for most models.
          sampling: fields in place of those of `config`: `temperature=0.7, stop="\\n"`; and
            `parse_special`, as of `encode`.

        Raises:
          HymbaError: an invalid prompt or sampling value, or no such field; too little memory for
            them; or the model's logits are not finite.
        """
        _check_names(sampling.keys() - {"parse_special"})
        return collect(self.stream(prompts, config, stream_interval=DECODE_STEPS, **sampling))

    def stream(
        self,
        prompts: Prompts,
        config: SamplingConfig | None = None,
        *,
        stream_interval: int = 1,
        parse_special: bool = False,
        **sampling: Any,
    ) -> Iterator[Delta]:
        """`generate`, streamed.

        Args:
          stream_interval: tokens that are sampled between deltas, `DECODE_STEPS` at most.
          parse_special: as of `encode`.

        Raises:
          HymbaError: as for `generate`, or an invalid `stream_interval`.
        """
        stream_interval = _as_int("stream_interval", stream_interval)
        if not 1 <= stream_interval <= DECODE_STEPS:
            raise HymbaError(
                f"stream_interval is {stream_interval}, not between 1 and {DECODE_STEPS}"
            )
        _check_names(sampling)
        if config is None and self.defaults.applies(sampling):
            sampling = {**self.defaults.sampling, **sampling}
        config = dataclasses.replace(config or SamplingConfig(), **sampling)
        self.check_stop(config)
        sequences = self.encode(prompts, parse_special=parse_special)
        rows = min(len(sequences) * config.num_samples, self.batch_size)
        longest = max(map(len, sequences))
        self.engine.check_memory(
            rows,
            longest + min(config.max_new_tokens, self.engine.max_context - longest),
            prefilled=self.prefix_states,
        )
        return self._deltas(sequences, config, stream_interval)

    def check_stop(self, config: SamplingConfig) -> None:
        """Raises HymbaError for a stop token or string that no completion could have."""
        for token in config.stop_tokens:
            if token >= self.config.num_embeddings or not self._in_tokenizer[token]:
                raise HymbaError(
                    f"stop token {token} is not in the tokenizer, so it is never sampled"
                )
        for string in config.stop:
            parts = [name for name in self.tokenizer.special_tokens if name in string]
            if parts and string not in self.tokenizer.special_tokens:
                raise HymbaError(
                    f"stop {string!r} combines the special token {parts[0]} with other text, "
                    f"which no completion has: stop at {parts[0]} alone, or at the text"
                )

    def log_probs(self, sequences: Prompts) -> list[Float[np.ndarray, " tokens"]]:
        """The log-probability of each token of each sequence, given those before it.

        It is natural, and in the model's own distribution over its whole vocabulary. The
        beginning-of-sequence token has none, nor has the first token of a sequence given as tokens.

        Raises:
          HymbaError: an invalid sequence, too little memory, or logits that are not finite.
        """
        encoded = self.encode(sequences, max_new_tokens=0)
        self.engine.check_memory(min(len(encoded), self.batch_size), max(map(len, encoded)))
        batches = itertools.batched(encoded, self.batch_size)
        all_scores = [each.log_probs for batch in batches for each in self.engine.score(batch)]
        for i, scores in enumerate(all_scores):
            check_finite(prompt_name(i, len(encoded)), scores)
        return all_scores

    def encode_chat(
        self,
        messages: Sequence[chat_template.Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The prompt for the next answer in a conversation, by the tokenizer's chat template.

        Its arguments are those of `apply_chat_template` in the transformers library, and so are
        its tokens, but for control tokens in messages, which are ordinary text.

        Args:
          messages: each with a "role" (system, user, assistant, tool) and its "content".
          tools: that the model may call, as JSON schemas.
          documents: for retrieval.
          add_generation_prompt: whether to end where an answer begins.
          variables: further template variables.

        Raises:
          HymbaError: the tokenizer has no chat template, or its template fails.
        """
        return chat_template.encode(
            self.tokenizer,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )

    def encode(
        self, prompts: Prompts, *, max_new_tokens: int = 1, parse_special: bool = False
    ) -> list[list[int]]:
        """The tokens of prompts; an empty one is the beginning-of-sequence token.

        Args:
          max_new_tokens: new tokens that must fit after each prompt.
          parse_special: whether the names of control tokens in a prompt are these tokens, not
            ordinary text.

        Raises:
          HymbaError: they are not prompts, one is too long, or one has an invalid token.
        """
        return encode_prompts(
            prompts,
            self.tokenizer,
            self.config.num_embeddings,
            self.engine.max_context,
            max_new_tokens,
            parse_special=parse_special,
        )

    def stop_tokens(self, config: SamplingConfig) -> list[int]:
        """The tokens that end a completion, which are no part of it.

        They are the end-of-sequence tokens, `stop_tokens`, and each of `stop` that is the name of a
        control token, as no text stream ever sees it.
        """
        named = self.tokenizer.control.ids
        strings = [named[string] for string in config.stop if string in named]
        ends = (self.config.eos_token_id, *self.defaults.eos_token_ids)
        return sorted({*ends, *config.stop_tokens, *strings})

    def _deltas(
        self, prompts: list[list[int]], config: SamplingConfig, stream_interval: int
    ) -> Iterator[Delta]:
        rows = [(i, sample) for i in range(len(prompts)) for sample in range(config.num_samples)]
        rows.sort(key=lambda row: len(prompts[row[0]]))  # less padding
        for batch in itertools.batched(rows, self.batch_size):
            yield from self._batch_deltas(batch, prompts, config, stream_interval)

    def _batch_deltas(
        self,
        rows: Sequence[tuple[int, int]],
        prompts: list[list[int]],
        config: SamplingConfig,
        stream_interval: int,
    ) -> Iterator[Delta]:
        """Prefills a batch of prompts and decodes until each row has stopped."""
        engine, indices = self.engine, list(dict.fromkeys(i for i, _ in rows))
        streams = [
            CompletionStream(
                self.tokenizer,
                prompts[i],
                config,
                engine.max_context,
                index=i,
                sample=sample,
                name=prompt_name(i, len(prompts)),
            )
            for i, sample in rows
        ]
        context = max(
            len(prompts[i]) + stream.max_new_tokens
            for (i, _), stream in zip(rows, streams, strict=True)
        )
        if self.prefix_states and len(indices) == 1:
            prefilled = self._prefixes(context).prefill(engine, prompts[indices[0]], context)
        else:
            prefilled = engine.prefill([prompts[i] for i in indices], context)
        if len(indices) < len(rows):
            prefilled = engine.repeat(prefilled, [indices.index(i) for i, _ in rows])
        stop_tokens = self.stop_tokens(config)
        requests = [
            Request(prompts[i], config, sample, stream.max_new_tokens, stop_tokens)
            for (i, sample), stream in zip(rows, streams, strict=True)
        ]
        state, sampled = engine.insert(prefilled, requests)
        if self.speculate and len(streams) == 1:
            yield from self._speculative_deltas(
                streams[0], PromptLookup(prompts[indices[0]]), state, sampled, stream_interval
            )
            return
        while True:
            for stream, *news in zip(streams, *jax.device_get(sampled), strict=False):
                if not stream.finished:
                    yield stream.push(*news)
            finished = [i for i, stream in enumerate(streams) if stream.finished]
            if len(finished) == len(streams):
                return
            state = engine.stop(state, finished)
            state, sampled = engine.decode(state, stream_interval)

    def _prefixes(self, context: int) -> PrefixCache:
        """The states of caches of this size; those of another are dropped."""
        size = self.engine.row_bytes(context)
        if self._prefix_cache is None or self._prefix_cache[0] != size:
            self._prefix_cache = size, PrefixCache(self.engine.max_chunk, self.prefix_states)
        return self._prefix_cache[1]

    def _speculative_deltas(
        self,
        stream: CompletionStream,
        lookup: PromptLookup,
        state: DecodeState,
        sampled: SampledTokens,
        stream_interval: int,
    ) -> Iterator[Delta]:
        """Decodes a sequence until it has stopped, by drafts where they pay.

        Args:
          state: of one row.
          sampled: its first token.
        """
        record = lookup.decoded
        while True:
            (news,) = zip(*jax.device_get(sampled), strict=True)
            yield stream.push(*news)
            if stream.finished:
                return
            record([token for token in news[0].tolist() if token >= 0])
            if draft := lookup.draft(min(MAX_DRAFT, stream.num_tokens_left - 1)):
                state, sampled = self.engine.verify(state, draft)
                record = lookup.verified
            else:
                state, sampled = self.engine.decode(state, stream_interval)
                record = lookup.decoded


def collect(deltas: Iterable[Delta]) -> list[Completion]:
    """The completions that the deltas make up, in the order of their prompts."""
    done: dict[tuple[int, int], Completion] = {}
    for delta in deltas:
        place = delta.index, delta.sample
        completion = done.setdefault(place, Completion(*place))
        completion.text += delta.text
        completion.tokens += delta.tokens
        completion.log_probs += delta.log_probs
        completion.finish_reason = delta.finish_reason or completion.finish_reason
        completion.context_full |= delta.context_full
    return [done[place] for place in sorted(done)]


def _tokens_in_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> Bool[np.ndarray, " vocab"]:
    """Which rows of the model's vocabulary the tokenizer has a token for."""
    numbers = np.array([*tokenizer.model.get_vocab().values()])
    return np.isin(np.arange(vocab_size), numbers)


def _check_names(sampling: Iterable[str]) -> None:
    """Raises HymbaError for a name that no field of `SamplingConfig` has."""
    fields = [item.name for item in dataclasses.fields(SamplingConfig)]
    for name in sampling:
        if name in fields:
            continue
        if name in _LOAD_OPTIONS:
            raise HymbaError(f"{name} is set when a model is loaded (hymba_jax.load), not here")
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
        raise HymbaError(f"unknown option {name}: {hint}")


def _at_least(smallest: int, name: str, value: Any) -> int:
    number = _as_int(name, value)
    if number < smallest:
        raise HymbaError(f"{name} is {shown(number)}, not at least {smallest}")
    return number


def _as_int(name: str, value: Any) -> int:
    if not fits(value, int):
        raise HymbaError(f"{name} is {shown(value)}, not an integer")
    return operator.index(value)
