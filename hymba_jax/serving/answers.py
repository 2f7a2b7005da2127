"""Deltas to the answers of the OpenAI API: completions, chat completions, and their chunks.

An answer in one piece is formatted as a single delta per choice, so streams and whole answers
cannot differ.
"""

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from hymba_jax.files import json_text
from hymba_jax.inference.completion_stream import Delta, PromptScores
from hymba_jax.inference.text_stream import TextStream
from hymba_jax.inference.tool_calls import END
from hymba_jax.serving.tool_stream import ToolCallStream
from hymba_jax.tokenizer import Tokenizer

type Json = dict[str, Any]


class AnswerFormat(Protocol):
    """How deltas become the choices of an answer.

    Attributes:
      kind, chunk_kind: "object" of an answer in one piece, and of a chunk.
      prefix: of the answer's id.
    """

    kind: str
    chunk_kind: str
    prefix: str

    def opening(self, choice: int, delta: Delta) -> Json | None:
        """What a stream says of a choice before its first delta, which is given."""

    def chunk(self, choice: int, delta: Delta) -> Json | None:
        """A choice of a chunk; None if there is nothing to say."""

    def whole(self, choice: int, delta: Delta) -> Json:
        """A choice of an answer in one piece."""


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """The tokens that an answer took."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def merged(deltas: Iterable[Delta]) -> Delta:
    """The deltas of one choice, as one."""
    parts = [*deltas]
    return Delta(
        parts[0].index,
        parts[0].sample,
        "".join(part.text for part in parts),
        [token for part in parts for token in part.tokens],
        [value for part in parts for value in part.log_probs],
        parts[-1].finish_reason,
        alternatives=[top for part in parts for top in part.alternatives],
        offsets=[offset for part in parts for offset in part.offsets],
        stop_string=parts[-1].stop_string,
        prompt=parts[0].prompt,
        end=parts[-1].end,
    )


class CompletionFormat:
    """Of /v1/completions.

    Args:
      echoes: the text of each prompt, which its choices begin with.
      num_samples: choices of each prompt.
      log_probs: whether they are reported.
      has_alternatives: whether the likeliest tokens are, too.
    """

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self,
        tokenizer: Tokenizer,
        echoes: Sequence[str],
        num_samples: int,
        *,
        log_probs: bool,
        has_alternatives: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._log_probs = log_probs
        self._has_alternatives = has_alternatives
        self._echoes = [echo for echo in echoes for _ in range(num_samples)]

    def opening(self, choice: int, delta: Delta) -> Json | None:
        """The prompt that is echoed."""
        echo = self._echoes[choice]
        if not echo and delta.prompt is None:
            return None
        log_probs = self._prompt_log_probs(delta.prompt) if delta.prompt else None
        return self._choice(choice, echo, log_probs, None)

    def chunk(self, choice: int, delta: Delta) -> Json | None:
        if not (delta.text or delta.tokens or delta.finish_reason):
            return None
        log_probs = self._log_probs_of(choice, delta) if self._log_probs else None
        return self._choice(choice, delta.text, log_probs, delta.finish_reason)

    def whole(self, choice: int, delta: Delta) -> Json:
        log_probs = self._log_probs_of(choice, delta) if self._log_probs else None
        if log_probs and delta.prompt:
            before = self._prompt_log_probs(delta.prompt)
            log_probs = {
                name: (before[name] or []) + (values or []) or None
                for name, values in log_probs.items()
            }
        text = self._echoes[choice] + delta.text
        return self._choice(choice, text, log_probs, delta.finish_reason)

    @staticmethod
    def _choice(choice: int, text: str, log_probs: Json | None, reason: str | None) -> Json:
        return {"index": choice, "text": text, "logprobs": log_probs, "finish_reason": reason}

    def _log_probs_of(self, choice: int, delta: Delta) -> Json:
        """Of the tokens of a completion, and of the one that ended it."""
        tokens, log_probs, offsets = [*delta.tokens], [*delta.log_probs], [*delta.offsets]
        alternatives = [*delta.alternatives]
        if delta.end:
            tokens.append(delta.end.token)
            log_probs.append(delta.end.log_prob)
            offsets.append(delta.end.offset)
            alternatives += [delta.end.alternatives] if delta.end.alternatives else []
        return {
            "tokens": [token_name(self._tokenizer, token) for token in tokens],
            "token_logprobs": log_probs,
            "top_logprobs": self._top(alternatives, tokens, log_probs) or None,
            "text_offset": [len(self._echoes[choice]) + offset for offset in offsets],
        }

    def _prompt_log_probs(self, prompt: PromptScores) -> Json:
        """Of the tokens of a prompt; the first one has none."""
        text = TextStream(self._tokenizer, ())
        for token in prompt.tokens:
            text.push(token)
        text.finish()
        top = self._top(prompt.alternatives, prompt.tokens[1:], prompt.log_probs)
        return {
            "tokens": [token_name(self._tokenizer, token) for token in prompt.tokens],
            "token_logprobs": [None, *prompt.log_probs],
            "top_logprobs": [None, *top] if self._has_alternatives else None,
            "text_offset": text.offsets,
        }

    def _top(
        self,
        alternatives: Sequence[Sequence[tuple[int, float]]],
        tokens: Sequence[int],
        log_probs: Sequence[float],
    ) -> list[dict[str, float]]:
        """The likeliest tokens, and the one that is there, which may be none of them."""
        own = zip(tokens, log_probs, strict=True)
        return [
            {token_name(self._tokenizer, token): value for token, value in (*top, pair)}
            for top, pair in zip(alternatives, own, strict=False)
        ]


class ChatFormat:
    """Of /v1/chat/completions.

    Args:
      log_probs: whether they are reported.
      has_tools: whether tool calls in answers are taken out of their text.
      forced: what every answer begins with, as its prompt ends with that.
      closes_call: whether each answer has one call at most, whose end the model's stop string is.
    """

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        log_probs: bool,
        has_tools: bool,
        forced: str = "",
        closes_call: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._log_probs = log_probs
        self._has_tools, self._forced, self._closes_call = has_tools, forced, closes_call
        self._streams: dict[int, ToolCallStream] = {}

    def opening(self, choice: int, delta: Delta) -> Json | None:
        return self._choice(choice, "delta", {"role": "assistant", "content": ""}, None, None)

    def chunk(self, choice: int, delta: Delta) -> Json | None:
        content, calls = self._parts(choice, delta)
        first = self._streams[choice].num_calls - len(calls) if calls else 0
        fields: Json = {"content": content} if content else {}
        if calls:
            fields["tool_calls"] = [{"index": first + i, **call} for i, call in enumerate(calls)]
        if not (fields or self._log_probs or delta.finish_reason):
            return None
        return self._choice(
            choice, "delta", fields, self._log_probs_of(delta), self._reason(choice, delta)
        )

    def whole(self, choice: int, delta: Delta) -> Json:
        content, calls = self._parts(choice, delta)
        message: Json = {"role": "assistant", "content": content or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        return self._choice(
            choice, "message", message, self._log_probs_of(delta), self._reason(choice, delta)
        )

    def _parts(self, choice: int, delta: Delta) -> tuple[str, list[Json]]:
        """The text and the tool calls that are new."""
        if not self._has_tools:
            return delta.text, []
        text = delta.text
        if choice not in self._streams:
            self._streams[choice] = ToolCallStream()
            text = self._forced + text
        end = self._tokenizer.control.ids.get(END)  # if it is a token, no text ends in it
        is_end = delta.end is not None and delta.end.token == end
        if self._closes_call and (is_end or delta.stop_string == END):
            text += END
        content, calls = self._streams[choice].push(text, finish_reason=delta.finish_reason)
        return content, [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json_text(call.arguments),
                },
            }
            for call in calls
        ]

    def _reason(self, choice: int, delta: Delta) -> str | None:
        called = choice in self._streams and self._streams[choice].num_calls
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason

    def _log_probs_of(self, delta: Delta) -> Json | None:
        if not self._log_probs:
            return None
        alternatives = delta.alternatives or [[]] * len(delta.tokens)
        return {
            "content": [
                {
                    **self._token(token, value),
                    "top_logprobs": [self._token(*pair) for pair in top],
                }
                for token, value, top in zip(
                    delta.tokens, delta.log_probs, alternatives, strict=True
                )
            ],
            "refusal": None,
        }

    def _token(self, token: int, log_prob: float) -> Json:
        content = self._tokenizer.token_bytes(token)
        return {
            "token": token_name(self._tokenizer, token),
            "logprob": log_prob,
            "bytes": None if content is None else [*content],
        }

    @staticmethod
    def _choice(
        choice: int, name: str, content: Json, log_probs: Json | None, reason: str | None
    ) -> Json:
        return {"index": choice, name: content, "logprobs": log_probs, "finish_reason": reason}


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; "token_id:5" for one that has none, such as half of a character."""
    text = tokenizer.token_text(token)
    return f"token_id:{token}" if text is None else text


def head(answer: AnswerFormat, model: str, *, is_chunk: bool) -> Json:
    """The fields that name an answer; all chunks of one have the same."""
    return {
        "id": f"{answer.prefix}-{secrets.token_hex(12)}",
        "object": answer.chunk_kind if is_chunk else answer.kind,
        "created": int(time.time()),
        "model": model,
    }
