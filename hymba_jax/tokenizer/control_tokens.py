"""Control tokens: added tokens, as which user text must never be encoded.

A tokenizer recognises its added tokens by name wherever they occur ("<s>", "<|im_start|>"). In a
chat template that is wanted, in a prompt or a document it is not. Splitting texts at control tokens
would change how the rest is tokenized. Instead, a second tokenizer with the same ids has secret
names for the control tokens: user text is ordinary to it, and control tokens are written by their
secret names.
"""

import json
import secrets
import string
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, models

from hymba_jax.errors import HymbaError
from hymba_jax.types import Int

# Who wrote a character: the chat template; the role of a message, which may be a part of a control
# token's name ("<|" + role + "|>"); or a user.
TEMPLATE, ROLE, USER = 0, 1, 2


class Match(NamedTuple):
    """A control token in a text: its id, and where its name is (without spaces that it takes)."""

    token: int
    start: int
    end: int


class ControlTokens:
    """The control tokens of a tokenizer.

    These are all added tokens, special or not, except white space, which is how the tokenizer
    writes indentation.

    Attributes:
      ids: by name.
      ordinary: the second tokenizer, which encodes every text as ordinary text.
    """

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        added = model.get_added_tokens_decoder()
        self.ids = {
            token.content: number
            for number, token in added.items()
            if token.special or not token.content.isspace()
        }
        self._names = {number: name for name, number in self.ids.items()}
        self._secrets = {number: _secret() for number in self._names}
        self.ordinary = _renamed(
            model, {name: self._secrets[number] for name, number in self.ids.items()}
        )
        for number, secret in self._secrets.items():
            if self.ordinary.token_to_id(secret) != number:
                raise HymbaError(
                    f"the id of added token {self._names[number]!r} is not that of its name"
                )
        # The library's own search for added tokens: what is between them is token 0.
        self._matcher = tokenizers.Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        if model.normalizer is not None:
            self._matcher.normalizer = model.normalizer
        self._matcher.add_tokens([added[number] for number in sorted(added)])
        self._matched = {
            token: number
            for name, number in self.ids.items()
            if (token := self._matcher.token_to_id(name)) is not None
        }
        self._neutral_letter, self._neutral_mark = self._neutral_characters()

    def encode(self, text: str, origins: bytes) -> list[int]:
        """Token ids of a text.

        Names of control tokens are control tokens only where the template wrote them.

        Args:
          origins: who wrote each character: TEMPLATE, ROLE or USER.
        """
        rewritten = self._rewritten(text, self.find(text, origins))
        return token_ids(self.ordinary, rewritten)

    def encode_with_spans(
        self, text: str, origins: bytes
    ) -> tuple[list[int], Int[np.ndarray, "tokens 2"]]:
        """The ids of `encode`, and where in the text the characters of each start and end.

        Tokens that share a character, such as its bytes, have the same span.
        """
        matches = self.find(text, origins)
        encoding = _encoding(self.ordinary, self._rewritten(text, matches))
        # The position in the text that each in the rewritten one stands for: of a name its start.
        pieces, done = [], 0
        for match in matches:
            name = np.full(len(self._secrets[match.token]), match.start)
            pieces += [np.arange(done, match.start), name]
            done = match.end
        positions = np.concatenate([*pieces, np.arange(done, len(text) + 1)])
        spans = positions[np.array(encoding.offsets, np.int64).reshape(-1, 2)]
        return encoding.ids, spans

    def _rewritten(self, text: str, matches: Sequence[Match]) -> str:
        """The text with secret names in place of the matches."""
        pieces, done = [], 0
        for match in matches:
            pieces += [text[done : match.start], self._secrets[match.token]]
            done = match.end
        return "".join(pieces) + text[done:]

    def find(self, text: str, origins: bytes) -> list[Match]:
        """The control tokens of which no character is a user's, nor all of them a role's."""
        visible = text
        while True:
            matches = list(self._matches(visible))
            forged = [match for match in matches if not _is_templates(origins, match)]
            if not forged:
                return matches
            # Removing them may reveal others that overlapped.
            before, visible = visible, self._hidden(visible, origins, forged)
            if visible == before:
                raise HymbaError(
                    "the tokenizer's normalizer makes it impossible to escape control tokens"
                )

    def _matches(self, text: str) -> Iterator[Match]:
        encoding = _encoding(self._matcher, text)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if (number := self._matched.get(token)) is None:
                continue
            name, found = self._names[number], text[start:end]
            if name == name.strip():  # else a token's own spaces, and not those beside it
                start += len(found) - len(found.lstrip())
                end -= len(found) - len(found.rstrip())
            yield Match(number, start, end)

    def _hidden(self, text: str, origins: bytes, matches: list[Match]) -> str:
        """The text with user-written names of control tokens replaced.

        Letters become letters and marks become marks, as neighbouring tokens may depend on it.
        """
        characters = list(text)
        for match in matches:
            for i in range(match.start, match.end):
                if origins[i] != TEMPLATE:
                    word = characters[i].isalnum() or characters[i] == "_"
                    characters[i] = self._neutral_letter if word else self._neutral_mark
        return "".join(characters)

    def _neutral_characters(self) -> tuple[str, str]:
        """A letter and a mark that are in no control token's name."""
        taken = set("".join(self.ids))
        if (normalizer := self._matcher.normalizer) is not None:
            taken |= set("".join(map(normalizer.normalize_str, self.ids)))
        letters = (
            chr(code)
            for code in range(ord("\N{GREEK SMALL LETTER ALPHA}"), 0x3000)
            if chr(code).isalpha()
        )
        marks = (chr(code) for code in range(ord("\N{LEFTWARDS ARROW}"), 0x3000))
        return (
            next(letter for letter in letters if letter not in taken),
            next(mark for mark in marks if mark not in taken),
        )


def token_ids(model: tokenizers.Tokenizer, text: str) -> list[int]:
    """The token ids of a text, while other threads run.

    As a batch of one: the library's `encode` holds the GIL, for seconds if the text is long.
    """
    (encoding,) = model.encode_batch_fast([text], add_special_tokens=False)
    return encoding.ids


def _encoding(model: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """As `token_ids`, with where in the text each token is; that takes longer."""
    (encoding,) = model.encode_batch([text], add_special_tokens=False)
    return encoding


def _is_templates(origins: bytes, match: Match) -> bool:
    written = origins[match.start : match.end]
    return USER not in written and TEMPLATE in written


def _secret() -> str:
    """A name that nobody can guess, in letters that no normalizer changes."""
    return "".join(secrets.choice(string.ascii_lowercase) for _ in range(40))


def _renamed(model: tokenizers.Tokenizer, names: dict[str, str]) -> tokenizers.Tokenizer:
    """The tokenizer with some added tokens renamed; ids are unchanged.

    They are renamed in the vocabulary as well, from which a model may take whole words.
    """
    content = json.loads(model.to_str())
    content |= {"truncation": None, "padding": None, "post_processor": None}
    for token in content["added_tokens"]:
        if token["content"] in names:
            # Its neighbours have been looked at where its own name was.
            token |= {"content": names[token["content"]], "single_word": False}
    kind = content["model"]
    if isinstance(kind["vocab"], dict):
        kind["vocab"] = {names.get(name, name): id for name, id in kind["vocab"].items()}
    else:
        kind["vocab"] = [[names.get(name, name), score] for name, score in kind["vocab"]]
    if kind.get("unk_token") in names:
        kind["unk_token"] = names[kind["unk_token"]]
    if "merges" in kind:
        prefix = len(kind.get("continuing_subword_prefix") or "")
        kind["merges"] = [
            [left, right]
            for left, right in kind["merges"]
            if names.keys().isdisjoint((left, right, left + right[prefix:]))
        ]
    return tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))


def marked_special(model: tokenizers.Tokenizer, name: str) -> AddedToken:
    """The token called `name`, marked as special and otherwise as the tokenizer has it."""
    for token in model.get_added_tokens_decoder().values():
        if token.content == name:
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            kept = {flag: getattr(token, flag) for flag in flags}
            return AddedToken(name, special=True, **kept)
    return AddedToken(name, special=True)
