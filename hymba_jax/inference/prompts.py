"""Prompts of any accepted type, as tokens."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

import numpy as np

from hymba_jax.config.field_types import plain, shown
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import Tokenizer

type Prompt = str | Iterable[SupportsIndex]
"""A string, which is prefixed with the beginning-of-sequence token, or token ids, used
unchanged."""

type Prompts = str | Iterable[Prompt]
"""One string, or an iterable of prompts, also a generator or rows of a NumPy array."""


def encode_prompts(
    prompts: Any,
    tokenizer: Tokenizer,
    vocab_size: int,
    context: int,
    max_new_tokens: int,
    *,
    parse_special: bool = False,
) -> list[list[int]]:
    """The tokens of `Prompts`; an empty prompt is the beginning-of-sequence token.

    Args:
      vocab_size: of the model.
      context: tokens that a prompt and what follows it may have.
      max_new_tokens: new tokens that must fit after each prompt.
      parse_special: whether the names of control tokens in a prompt are these tokens.

    Raises:
      HymbaError: they are not prompts, one is too long, or one has an invalid token.
    """
    prompts = _as_list(prompts)
    sequences = []
    for i, prompt in enumerate(prompts):
        name = prompt_name(i, len(prompts))
        if isinstance(prompt, str):
            tokens = tokenizer.encode(prompt, parse_special=parse_special)
            if tokens[:1] != tokenizer.bos_ids:  # a prompt with parse_special may begin with them
                tokens = [*tokenizer.bos_ids, *tokens]
        else:
            tokens = [*_tokens(name, prompt)] or tokenizer.bos_ids
        if not tokens:
            raise HymbaError(f"{name} is empty, and the tokenizer has no token to begin with")
        if outside := [token for token in tokens if not 0 <= token < vocab_size]:
            token = shown(outside[0])
            raise HymbaError(f"{name}: token {token} is outside the vocabulary of {vocab_size}")
        if len(tokens) + max_new_tokens > context:
            raise HymbaError(
                f"{name}: {len(tokens)} tokens do not fit the model's context of {context} "
                f"together with {max_new_tokens} new ones: shorten it, or ask for fewer"
            )
        sequences.append(tokens)
    return sequences


def prompt_name(index: int, count: int) -> str:
    """The name of one of so many prompts in messages."""
    return f"prompt {index + 1}" if count > 1 else "the prompt"


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | Mapping) or not _is_iterable(prompts):
        raise HymbaError(
            f"prompts are {_kind(prompts)}, not a string or a list of strings or of lists of tokens"
        )
    prompts = [*prompts]
    if not prompts:
        raise HymbaError("there are no prompts")
    return prompts


def _tokens(name: str, prompt: Any) -> Iterable[int]:
    """The tokens of a prompt that is not a string."""
    if isinstance(prompt, bytes | bytearray | Mapping) or not _is_iterable(prompt):
        raise HymbaError(
            f"{name} is {_kind(prompt)}, neither a string nor a list of tokens "
            "(a prompt of tokens is a list in the list of prompts)"
        )
    # An array on a device comes over at once, not token by token.
    for i, token in enumerate(np.asarray(prompt) if hasattr(prompt, "__array__") else prompt):
        if isinstance(token, bool | np.bool) or not hasattr(token, "__index__"):
            raise HymbaError(f"{name}: token {i + 1} is {_kind(token)}, not an integer")
        try:
            yield operator.index(token)
        except TypeError as error:  # an array, or a float on a device
            raise HymbaError(f"{name}: token {i + 1} is {_kind(token)}, not an integer") from error


def _is_iterable(value: Any) -> bool:
    try:
        iter(value)  # which an array without axes has, but does not allow
    except TypeError:
        return False
    return True


def _kind(value: Any) -> str:
    """The value in words, short whatever it is."""
    if isinstance(value, bytes | bytearray):
        return "bytes, which must be decoded first"
    if value is None or isinstance(value, bool | int | float | np.generic):
        return shown(plain(value))
    return f"of type {type(value).__name__}"
