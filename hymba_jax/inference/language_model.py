"""Text in, text out: a model with its tokenizer."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hymba_jax.config import DType
from hymba_jax.data import Tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.inference import chat_template
from hymba_jax.inference.engine import NO_TOKEN, STEPS, Engine, Limits, bucket
from hymba_jax.inference.generation_config import GenerationDefaults
from hymba_jax.inference.sampling import SamplingConfig, make_sampler
from hymba_jax.inference.text_stream import TextStream
from hymba_jax.model import Hymba
from hymba_jax.types import Float, Int

type Prompt = str | Sequence[int]
"""A text, which the begin-of-text token is put before, or tokens as they are."""

type FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What is new of one continuation.

    Attributes:
      index: of the prompt.
      sample: which of its continuations.
      finish_reason: "stop" at the end of the text or at what was asked to stop it, "length" where
        there is no room for more; None while there is more to come.
    """

    index: int
    sample: int
    text: str
    tokens: list[int]
    log_probs: list[float]
    finish_reason: FinishReason | None


@dataclass
class Completion:
    """One continuation of one prompt.

    Attributes:
      index: of the prompt.
      sample: which of its continuations.
      tokens: without the one that stopped it.
      log_probs: of each token, in the model's own distribution, before temperature and filters.
    """

    index: int
    sample: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


class LanguageModel:
    """A model that continues texts, many at a time.

    A continuation depends on its prompt and its seed, never on the texts beside it.

    Args:
      state_dtype: that the SSM's states are kept in; they are computed in float32.
      batch_size: texts that are continued at the same time.
      context: tokens of every text's cache; as many as each batch needs if absent.
      defaults: end tokens besides the config's, and the sampling of calls that name none.

    Raises:
      HymbaError: such a model cannot be.
    """

    def __init__(
        self,
        model: Hymba,
        tokenizer: Tokenizer,
        *,
        state_dtype: DType = "float32",
        batch_size: int = 8,
        context: int | None = None,
        defaults: GenerationDefaults | None = None,
    ):
        if batch_size < 1:
            raise HymbaError(f"batch_size is {batch_size}, not at least 1")
        self.config = model.config
        self.tokenizer = tokenizer
        self.engine = Engine(model, state_dtype=state_dtype, context=context)
        self.batch_size = batch_size
        self.defaults = defaults or GenerationDefaults()

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        config: SamplingConfig | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Continuations of every prompt: `num_samples` of the first, then of the second, ...

        Args:
          config: how to sample; if absent, and if `sampling` has no such field, as the model's
            `defaults` say, which is greedily for most.
          sampling: fields in place of those of `config`: `temperature=0.7, stop=("\\n",)`; and
            `parse_special`, as of `encode`.

        Raises:
          HymbaError: a prompt or a sampling value that cannot be.
        """
        return collect(self.stream(prompts, config, every=STEPS, **sampling))

    def stream(
        self,
        prompts: str | Sequence[Prompt],
        config: SamplingConfig | None = None,
        *,
        every: int = 1,
        parse_special: bool = False,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """The same as `generate`, as it comes.

        Args:
          every: tokens of a continuation between its pieces, `STEPS` at most.
          parse_special: as of `encode`.

        Raises:
          HymbaError: a prompt, a sampling value or an `every` that cannot be.
        """
        if not 1 <= every <= STEPS:
            raise HymbaError(f"every is {every}, not 1 to {STEPS}")
        if config is None and self.defaults.applies(sampling):
            sampling = {**self.defaults.sampling, **sampling}
        config = dataclasses.replace(config or SamplingConfig(), **sampling)
        return self._pieces(self.encode(prompts, parse_special=parse_special), config, every)

    def log_probs(self, texts: str | Sequence[Prompt]) -> list[Float[np.ndarray, " tokens"]]:
        """The log-probability of each token of each text, given those before it.

        The begin-of-text token has none, nor has the first token of a text given as tokens.

        Raises:
          HymbaError: a text that cannot be.
        """
        tokens = self.encode(texts, room=0)
        batches = itertools.batched(tokens, self.batch_size)
        return [scores for batch in batches for scores in self.engine.score(batch)]

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
          documents: for it to look things up in.
          add_generation_prompt: whether to end where an answer begins.
          variables: whatever else the template knows.

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
        self, prompts: str | Sequence[Prompt], *, room: int = 1, parse_special: bool = False
    ) -> list[list[int]]:
        """The tokens of prompts; an empty one begins at the start of a text.

        Args:
          room: tokens that must still fit behind each.
          parse_special: whether the names of control tokens in a text are these tokens, not
            ordinary text.

        Raises:
          HymbaError: there are no prompts, or one is too long, or has a token that is none.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not prompts:
            raise HymbaError("there are no prompts")
        texts = []
        for i, prompt in enumerate(prompts):
            name = f"prompt {i + 1}" if len(prompts) > 1 else "the prompt"
            if isinstance(prompt, str):
                text = self.tokenizer.encode(prompt, parse_special=parse_special)
                if text[:1] != self.tokenizer.bos_ids:  # which a parsed one may begin with
                    text = [*self.tokenizer.bos_ids, *text]
            else:
                text = [int(token) for token in prompt] or self.tokenizer.bos_ids
            if not text:
                raise HymbaError(f"{name} is empty, and the tokenizer has no token to begin with")
            vocab_size, context = self.config.num_embeddings, self.engine.max_context
            if outside := [token for token in text if not 0 <= token < vocab_size]:
                raise HymbaError(
                    f"{name}: token {outside[0]} is outside the vocabulary of {vocab_size}"
                )
            if len(text) + room > context:
                raise HymbaError(
                    f"{name}: {len(text)} tokens, and the model's context is {context} with what "
                    "is to follow: shorten it"
                )
            texts.append(text)
        return texts

    def _pieces(
        self, texts: list[list[int]], config: SamplingConfig, every: int
    ) -> Iterator[Piece]:
        rows = [(i, sample) for i in range(len(texts)) for sample in range(config.num_samples)]
        rows.sort(key=lambda row: len(texts[row[0]]))  # less padding
        for batch in itertools.batched(rows, self.batch_size):
            yield from self._batch_pieces(batch, texts, config, every)

    def _batch_pieces(
        self,
        rows: Sequence[tuple[int, int]],
        texts: list[list[int]],
        config: SamplingConfig,
        every: int,
    ) -> Iterator[Piece]:
        """Reads a batch of prompts and continues them until each row has stopped."""
        engine, indices = self.engine, list(dict.fromkeys(i for i, _ in rows))
        writers = [_Writer(self, *row, texts[row[0]], config) for row in rows]
        context = max(
            len(texts[i]) + writer.room for (i, _), writer in zip(rows, writers, strict=True)
        )
        read = engine.prefill([texts[i] for i in indices], context)
        if len(indices) < len(rows):
            read = engine.repeat(read, [indices.index(i) for i, _ in rows])
        size = len(read.last)
        padding = [0] * (size - len(rows))
        sampler = make_sampler([config] * size, [sample for _, sample in rows] + padding)
        limits = self._limits([writer.room for writer in writers] + padding, config)
        seen = np.zeros((size, self.config.num_embeddings), bool)
        for (i, _), row in zip(rows, seen, strict=False):
            row[texts[i]] = True

        state, drawn = engine.first(read, sampler, limits, jnp.asarray(seen))
        while True:
            tokens, log_probs, stopped = jax.device_get((*drawn, state.stopped))
            for writer, *news in zip(writers, tokens, log_probs, stopped, strict=False):
                if not writer.over:
                    yield writer.take(*news)
            over = [writer.over for writer in writers]
            if all(over):
                return
            state = state._replace(stopped=jnp.array(over + [True] * len(padding)))
            state, drawn = engine.decode(state, sampler, limits, every)

    def _limits(self, room: list[int], config: SamplingConfig) -> Limits:
        # A stop string that is a control token: no text stream ever sees it.
        named = self.tokenizer.control.ids
        strings = [named[string] for string in config.stop if string in named]
        ends = (self.config.eos_token_id, *self.defaults.eos_token_ids)
        stops = sorted({*ends, *config.stop_tokens, *strings})
        stops += [NO_TOKEN] * (bucket(len(stops), 4) - len(stops))
        return Limits(
            jnp.array(room, jnp.int32), jnp.tile(jnp.array([stops], jnp.int32), (len(room), 1))
        )


class _Writer:
    """Makes pieces of what is drawn for one row, until the row is over.

    Attributes:
      room: tokens that may be drawn.
    """

    def __init__(
        self,
        model: LanguageModel,
        index: int,
        sample: int,
        prompt: list[int],
        config: SamplingConfig,
    ):
        self.room = min(config.max_new_tokens, model.engine.max_context - len(prompt))
        self.over = False
        self._place = index, sample
        self._stream = TextStream(model.tokenizer, prompt, config.stop)
        self._count = 0

    def take(
        self,
        tokens: Int[np.ndarray, " steps"],
        log_probs: Float[np.ndarray, " steps"],
        stopped: np.bool,
    ) -> Piece:
        """The piece of these tokens, up to the one that meets a stop string."""
        new, text = [], ""
        for token in itertools.takewhile(lambda token: token != NO_TOKEN, tokens.tolist()):
            new.append(token)
            text += self._stream.push(token)
            if self._stream.stopped:
                break
        self._count += len(new)
        self.over = bool(stopped) or self._stream.stopped
        reason: FinishReason | None = None
        if self.over:
            text += self._stream.finish()
            ended = self._stream.stopped or self._count < self.room
            reason = "stop" if ended else "length"
        return Piece(*self._place, text, new, log_probs[: len(new)].tolist(), reason)


def collect(pieces: Iterable[Piece]) -> list[Completion]:
    """The continuations that the pieces make up, in the order of their prompts."""
    done: dict[tuple[int, int], Completion] = {}
    for piece in pieces:
        place = piece.index, piece.sample
        completion = done.setdefault(place, Completion(*place))
        completion.text += piece.text
        completion.tokens += piece.tokens
        completion.log_probs += piece.log_probs
        completion.finish_reason = piece.finish_reason or completion.finish_reason
    return [done[place] for place in sorted(done)]
