"""`hymba chat`: a conversation, each answer written as it comes."""

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.hidden_fields import without
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.tokenizer import chat_template

# Ends of prompts: a turn starts from that of the one before or, if this one failed, an earlier one.
PREFIX_STATES = 2

HELP = "/reset forgets the conversation, /exit leaves, anything else is said to the model"


@dataclass(frozen=True)
class ChatConfig:
    """Chats with a model whose tokenizer has a chat template.

    An answer ends where the tokenizer's chat template ends one, at the end-of-sequence token, or
    at `stop` and `stop_tokens`.

    Attributes:
      sampling: how answers are sampled; each with a seed of its own, one above that before it.
      system: system message, before the conversation.
      speculate: draft the next tokens from earlier ones of the conversation, where that pays; the
        answer's tokens are the same, up to the rounding of matmuls of several tokens and, with
        state_dtype bfloat16, of states, once for all of these tokens.

    Raises:
      HymbaError: there would be several answers.
    """

    choice: Annotated[
        ModelChoice,
        tyro.conf.arg(name="", constructor=without(ModelChoice, "batch_size")),
    ]
    sampling: Annotated[
        SamplingConfig,
        tyro.conf.arg(name="", constructor=without(SamplingConfig, "num_samples")),
    ]
    system: str = ""
    speculate: bool = False

    def __post_init__(self) -> None:
        if self.sampling.num_samples != 1:
            raise HymbaError(
                f"num_samples is {self.sampling.num_samples}: a conversation has one answer"
            )


def load(choice: ModelChoice, *, speculate: bool) -> LanguageModel:
    """The model for a conversation.

    With a `context`, a turn prefills its new tokens, the answer before them, and less than a chunk;
    one for which old messages are dropped prefills those that are kept.

    Raises:
      HymbaError: there is none.
    """
    return choice.load(speculate=speculate, prefix_states=PREFIX_STATES)


def run(model: LanguageModel, config: ChatConfig) -> None:
    """Reads messages from standard input and writes answers to standard output, up to its end.

    What is not an answer goes to standard error. Ctrl-C stops an answer; while a message is being
    read it leaves, as Ctrl-D does.

    Raises:
      HymbaError: the tokenizer has no chat template, or a broken one.
    """
    chat = Chat(model, config)
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401  input() then edits lines and keeps a history
    _note(f"{config.choice.model}: /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help for more")
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            if prompt:
                _note("")  # the shell's prompt gets a line of its own
            return
        except UnicodeDecodeError as error:
            raise HymbaError(f"the input is not valid UTF-8: {error}") from error
        if line == "/exit":
            return
        if line == "/help":
            _note(HELP)
        elif line == "/reset":
            chat.history.clear()
        elif line:
            try:
                chat.say(line)
            except HymbaError as error:
                _note(f"error: {error}")


class Chat:
    """A conversation.

    Attributes:
      history: messages and answers that still fit the context.
    """

    def __init__(self, model: LanguageModel, config: ChatConfig) -> None:
        stop, stop_tokens = chat_template.answer_end(model.tokenizer)
        self.history: list[dict[str, str]] = []
        self._model = model
        self._system = [_message("system", config.system)] if config.system else []
        self._sampling = dataclasses.replace(
            config.sampling,
            stop=config.sampling.stop + stop,
            stop_tokens=config.sampling.stop_tokens + stop_tokens,
        )

    def say(self, message: str) -> None:
        """Writes the answer, as far as it is not interrupted, and appends both to the history.

        Raises:
          HymbaError: the message is too long, or the template refuses it; it is dropped.
        """
        answer = ""
        try:
            prompt = self._prompt(message)
            for delta in self._model.stream([prompt], self._sampling):
                answer += delta.text
                print(delta.text, end="", flush=True)
        except KeyboardInterrupt:
            pass  # the partial answer is kept
        print()
        self.history += [_message("user", message), _message("assistant", answer)]
        seed = (self._sampling.seed + 1) % 2**32
        self._sampling = dataclasses.replace(self._sampling, seed=seed)

    def _prompt(self, message: str) -> list[int]:
        """The conversation with `message`; drops old messages if it does not fit."""
        context = self._model.engine.max_context
        # A message may leave less room for its answer, the history may not.
        room = context - min(self._sampling.max_new_tokens, context // 2)

        def encoded(history: list[dict[str, str]]) -> list[int]:
            messages = [*self._system, *history, _message("user", message)]
            return self._model.encode_chat(messages)

        kept, prompt = self.history, encoded(self.history)
        if len(prompt) > room:
            alone = len(encoded([]))
            # With half of the room left, the next turns drop nothing and find the states kept.
            most = alone + max(room - alone, 0) // 2
            while kept and len(prompt) > most:
                kept = kept[2:]
                prompt = encoded(kept)
        if len(prompt) >= context:
            raise HymbaError(
                f"the message is too long: a prompt of {len(prompt)} tokens leaves no room for "
                f"an answer in the model's context of {context}"
            )
        if len(kept) < len(self.history):
            _note("(the oldest messages no longer fit the context and were dropped)")
            self.history = kept
        return prompt


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
