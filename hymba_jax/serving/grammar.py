"""Answers that a grammar allows: JSON schemas, tool calls, regular expressions and Lark grammars.

llguidance says before each token which ones may come, and what is sampled is one of them. A mask is
computed on the host, while the device waits, in about a tenth of a millisecond.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import llguidance
import llguidance.numpy as bitmasks
import numpy as np

from hymba_jax.errors import HymbaError
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.inference.tool_calls import END, START, call_beginning
from hymba_jax.tokenizer import chat_template
from hymba_jax.types import Bool

# On one line, with a blank behind commas and colons or none: a model could write blanks forever
# where any are allowed. The "x-guidance" of a schema may say otherwise.
_LAYOUT: Any = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}


class GrammarError(HymbaError):
    """What a request's answer has to follow is invalid, or leads nowhere."""


class Matcher:
    """Where an answer is in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, num_tokens: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros(vocab_size, bool)
        self._bits = bitmasks.allocate_token_bitmask(1, num_tokens)

    def mask(self) -> Bool[np.ndarray, " vocab"]:
        """The tokens that may come next.

        Raises:
          GrammarError: there are none, or the grammar has become too complex.
        """
        bitmasks.fill_next_token_bitmask(self._matcher, self._bits)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(self._mask)]
        self._mask[: len(allowed)] = allowed
        if self._matcher.is_error() or not self._mask.any():
            reason = _line(self._matcher.get_error()) or "it leads nowhere"
            raise GrammarError(f"the grammar allows no token: {reason}")
        return self._mask

    def push(self, token: int) -> None:
        """Goes on behind a token that the mask allowed."""
        self._matcher.consume_token(token)


class Grammar:
    """A grammar that answers have to follow."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, num_tokens: int) -> None:
        self._matcher, self._sizes = matcher, (vocab_size, num_tokens)

    def start(self) -> Matcher:
        """The beginning of an answer."""
        return Matcher(self._matcher.deep_copy(), *self._sizes)


class Grammars:
    """Compiles grammars for the tokens of a model.

    Attributes:
      ends: tokens that an answer may end with, where its grammar lets it.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._vocab_size = model.config.num_embeddings
        self._model = model.tokenizer.model
        ends = {model.config.eos_token_id, *model.defaults.eos_token_ids}
        if model.tokenizer.chat_template is not None:
            ends.update(chat_template.answer_end(model.tokenizer)[1])
        self.ends = tuple(sorted(ends & {*self._model.get_vocab().values()}))

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        try:
            return llguidance.LLTokenizer(self._model.to_str(), eos_token=[*self.ends])
        except Exception as error:
            raise HymbaError(f"grammars: the tokenizer is not supported: {error}") from error

    def of_json_schema(self, schema: dict[str, Any]) -> Grammar:
        """JSON that a schema describes, on one line. Raises GrammarError if it is no schema."""
        make = functools.partial(llguidance.LLMatcher.grammar_from_json_schema, defaults=_LAYOUT)
        return self._compile(_grammar(make, schema))

    def of_tool_calls(
        self, schemas: Mapping[str, Mapping[str, Any]], forced: str, *, has_more: bool
    ) -> Grammar:
        """Calls of tools, as `tool_calls.py` reads them.

        Args:
          schemas: of the arguments of each tool, by its name.
          forced: what the prompt ends with of a call that the answer has to be; if empty, it is
            text with calls or without.
          has_more: whether others follow that call, each on a line of its own, if the model wants.

        Raises:
          GrammarError: a schema is none.
        """
        calls = []
        for name, schema in schemas.items():
            beginning = call_beginning(name).removeprefix(forced or START) + " "
            arguments = {"x-guidance": _LAYOUT, **schema, "type": "object"}
            calls.append(
                f"{json.dumps(beginning)} %json {json.dumps(arguments)} {json.dumps('} ' + END)}"
            )
        rules = [f"call: {' | '.join(calls)}"]
        if not forced:
            rules.append("start: (begun call)* text")
            rules.append(f"begun[lazy]: TEXT {json.dumps(START)}")
            rules.append("text: TEXT")
            rules.append(r"TEXT: /(.|\n)*/")
        elif has_more:
            rules.append(f"start: call ({json.dumps('\n' + START)} call)*")
        else:
            rules.append("start: call")
        return self.of_lark("\n".join(rules))

    def of_regex(self, pattern: str) -> Grammar:
        """Text that a regular expression matches. Raises GrammarError if it is none."""
        return self._compile(_grammar(llguidance.LLMatcher.grammar_from_regex, pattern))

    def of_lark(self, text: str) -> Grammar:
        """Text of a language in Lark's notation. Raises GrammarError if it is none."""
        return self._compile(_grammar(llguidance.LLMatcher.grammar_from_lark, text))

    def _compile(self, grammar: str) -> Grammar:
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the grammar is invalid: {_line(matcher.get_error())}")
        compiled = Grammar(matcher, self._vocab_size, self._tokens.vocab_size)
        compiled.start().mask()  # raises if no answer can begin
        return compiled


def _grammar(make: Callable[[Any], str], source: Any) -> str:
    try:
        return make(source)
    except ValueError as error:  # half of a UTF-16 pair, or a number beyond 64 bits
        raise GrammarError(f"the grammar is invalid: {_line(str(error))}") from error


def _line(message: str) -> str:
    reason = message.partition("<state>")[0]  # behind it, the parser's own
    return " ".join(reason.split())[:300]
