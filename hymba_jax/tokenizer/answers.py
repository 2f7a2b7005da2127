"""Which tokens of a conversation the loss is on: answers, and what ends each of them.

A chat template that has `{% generation %}` blocks marks its answers itself. Of any other, an answer
starts where its prompt ends: the messages before it, rendered with the generation prompt, as
inference does. It ends behind the token that ends answers (ChatML's "<|im_end|>"), or, where the
template ends them with text, with all that it renders of the messages up to this one. Both
renderings have to be how the whole conversation begins; else the template is refused. So is one
whose generation prompt ends in tokens that are others once an answer follows, as a space is that
the tokenizer joins to a word, and an answer at which that happens, as it can where the prompt ends
with a line break and the answer begins with white space. So what is trained on is what inference
generates, up to where it stops.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hymba_jax.config.data import LossOn
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer.chat_template import Message, answer_end, render_chat
from hymba_jax.tokenizer.control_tokens import USER
from hymba_jax.tokenizer.tokenizer import Tokenizer
from hymba_jax.tokenizer.traced_text import Traced, generated_spans, origins
from hymba_jax.types import Bool

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_MARK = "mark answers with {% generation %} in the template"
_WORDS = ("a", "in", "so", "the", "It", "The", "1")  # answers that begin otherwise are few


@dataclass(frozen=True)
class ChatText:
    """A conversation as text.

    Attributes:
      text: what the chat template writes.
      origins: who wrote each character, as `control_tokens.py` has it.
      answers: where each answer starts and ends, its end of turn included; rising.
      takes_eos: whether the end-of-sequence token has to follow, as the template ends answers with
        text: a model that is not trained on it would not end the last one.
    """

    text: str
    origins: bytes
    answers: tuple[tuple[int, int], ...]
    takes_eos: bool

    def __len__(self) -> int:
        return len(self.text)


class ChatPair(NamedTuple):
    """Two conversations that begin with the same prompt, of which one is preferred."""

    chosen: ChatText
    rejected: ChatText


class AnswerRenderer:
    """Renders conversations, whose last message is an answer, by a tokenizer's chat template.

    Args:
      loss_on: all answers, or the last one.

    Raises:
      HymbaError: the tokenizer has no template, or answers cannot be told from the rest of it.
    """

    def __init__(self, tokenizer: Tokenizer, loss_on: LossOn = "all") -> None:
        self._tokenizer, self._loss_on = tokenizer, loss_on
        self._end_token = next(iter(answer_end(tokenizer)[1]), None)
        if not _has_generation_blocks(tokenizer):
            self._check_template()
        self._check_prompt_end()

    def render(self, messages: Sequence[Message], num_given: int = 0, **options: Any) -> ChatText:
        """The conversation as text, and where the answers are.

        Args:
          num_given: messages at the start whose answers are not meant.
          options: tools, and variables of the template, as of `chat_template.encode`.

        Raises:
          HymbaError: the template fails, or an answer is empty, cannot be told from the rest, or
            begins with what the tokenizer joins to its prompt.
        """
        text = self._rendered(messages, options)
        turns = [
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and i >= num_given
        ]
        if self._loss_on == "last":
            turns = turns[-1:]
        if _has_generation_blocks(self._tokenizer):
            spans = self._marked(text, messages, turns, options)
        else:
            spans = self._compared(text, messages, turns, options)
        for start, stop in spans:
            if not text[start].isalnum():  # as `_WORDS` are
                self._check_joint(
                    text[:stop], start, "strip white space there, or remove the record"
                )
        takes_eos = self._end_token is None
        return ChatText(str.__str__(text), origins(text), tuple(spans), takes_eos)

    def text(self, messages: Sequence[Message], **options: Any) -> str:
        """The conversation as text alone, which the template is run once for.

        Raises:
          HymbaError: the template fails.
        """
        return str.__str__(self._rendered(messages, options))

    def _marked(
        self,
        text: Traced,
        messages: Sequence[Message],
        turns: Sequence[int],
        options: Mapping[str, Any],
    ) -> list[tuple[int, int]]:
        """What `{% generation %}` blocks wrote."""
        spans = generated_spans(text)
        if any(message["role"] == "assistant" for message in messages[: turns[0]]):
            before = self._rendered(messages[: turns[0]], options)
            if not text.startswith(before):
                raise HymbaError(
                    "the chat template writes the messages before an answer in another way when it "
                    "follows, so it cannot be told from earlier ones: set loss_on of conversations "
                    'to "all"'
                )
            spans = [span for span in spans if span[0] >= len(before)]
        if not spans:
            raise HymbaError(
                "the chat template's {% generation %} blocks write nothing, or it goes on to "
                "change what they write: write answers in them as they are to come out"
            )
        return spans

    def _compared(
        self,
        text: Traced,
        messages: Sequence[Message],
        turns: Sequence[int],
        options: Mapping[str, Any],
    ) -> list[tuple[int, int]]:
        """What the renderings of the messages up to each answer add to those of their prompts."""
        spans = []
        for turn in turns:
            prompt = self._rendered(messages[:turn], options, add_generation_prompt=True)
            is_last = turn == len(messages) - 1
            answered = text if is_last else self._rendered(messages[: turn + 1], options)
            start, end = self._span(prompt, answered, f"message {turn + 1}")
            if text[:end] != answered[:end]:
                raise HymbaError(
                    f"the chat template writes message {turn + 1}, an answer, in another way when "
                    f'others follow: set loss_on to "last", or {_MARK}'
                )
            spans.append((start, end))
        return spans

    def _span(self, prompt: Traced, answered: Traced, name: str) -> tuple[int, int]:
        """Where the answer to a prompt starts and ends.

        Args:
          answered: the prompt's messages and the answer, rendered.
        """
        if not answered.startswith(prompt):
            raise HymbaError(
                f"the chat template does not begin {name}, an answer, with its generation prompt, "
                f"so it cannot be told from the rest: {_MARK}"
            )
        start = len(prompt)
        last = origins(answered).rfind(USER, start)
        if last < 0:
            raise HymbaError(
                f"the chat template writes nothing of {name}, an answer: remove it, or give a "
                "template that writes its tool calls"
            )
        if self._end_token is None:
            return start, len(answered)
        for match in self._tokenizer.control.find(answered, origins(answered)):
            if match.token == self._end_token and match.start > last:
                return start, match.end
        token = self._tokenizer.model.id_to_token(self._end_token)
        raise HymbaError(
            f"the chat template does not end {name}, an answer, with {token}, as it ends others: "
            f"{_MARK}"
        )

    def _check_template(self) -> None:
        """Refuses a template that writes headers, but no generation prompt when asked for one.

        There the loss would be on the header before an answer, or on that behind it.
        """
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        prompt = self._rendered(messages[:1], {}, add_generation_prompt=True)
        if prompt != self._rendered(messages[:1], {}):
            return
        answered = self._rendered(messages, {})
        start, stop = self._span(prompt, answered, "message 2")
        first, last = origins(answered).find(USER, start), origins(answered).rfind(USER)
        around = answered[start:first], answered[last + 1 : stop] if self._end_token is None else ""
        if written := next(filter(str.strip, around), None):
            raise HymbaError(
                f"the chat template writes {str.__str__(written)!r} around an answer, whether "
                "asked for a generation prompt or not: let it heed add_generation_prompt, or "
                f"{_MARK}"
            )

    def _check_prompt_end(self) -> None:
        """Refuses a template whose generation prompt ends inside a token of what follows it."""
        messages = [{"role": "user", "content": "Hi"}]
        prompt = self._rendered(messages, {}, add_generation_prompt=True)
        for word in _WORDS:
            text = self._rendered([*messages, {"role": "assistant", "content": word}], {})
            if text.startswith(prompt):
                advice = "let the generation prompt end before that, or in a line break"
                self._check_joint(text, len(prompt), advice)

    def _check_joint(self, text: Traced, start: int, advice: str) -> None:
        """Raises HymbaError if the tokens before an answer are others than without it."""
        prompt = text[:start]
        # From the last control token on, which no token crosses: a conversation may be long.
        if found := self._tokenizer.control.find(prompt, origins(prompt)):
            prompt, text = prompt[found[-1].start :], text[found[-1].start :]
            start = len(prompt)
        ids, answered = (self._tokenizer.encode_traced(t, origins(t)) for t in (prompt, text))
        if answered[: len(ids)] != ids:
            raise HymbaError(
                "the tokenizer joins the end of the generation prompt, "
                f"{str.__str__(prompt[-8:])!r}, to the beginning of an answer, "
                f"{str.__str__(text[start : start + 8])!r}, so it would be trained on behind other "
                f"tokens than it is generated behind: {advice}"
            )

    def _rendered(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
    ) -> Traced:
        return render_chat(
            self._tokenizer, messages, add_generation_prompt=add_generation_prompt, **options
        )


def _has_generation_blocks(tokenizer: Tokenizer) -> bool:
    return any(map(_GENERATION.search, tokenizer.chat_templates.values()))


def encode_answers(
    tokenizer: Tokenizer, chat: ChatText
) -> tuple[list[int], Bool[np.ndarray, " tokens"]]:
    """The token ids of a conversation, and which of them are of answers.

    The whole text is encoded at once, so the ids are those of `chat_template.encode`. A token
    belongs to an answer if any of its characters does, as in the transformers library.
    """
    ids, spans = tokenizer.encode_with_spans(chat.text, chat.origins)
    is_answer = np.zeros(len(ids), bool)
    for start, stop in chat.answers:
        is_answer |= (spans[:, 0] < stop) & (spans[:, 1] > start)
    return ids, is_answer
