"""Conversations as the text, and the tokens, that a chat model continues.

A template is a Jinja program that comes with a tokenizer. It writes special tokens by their names;
in a message such a name is ordinary text. So that the two cannot be confused, `encode` replaces
the names in the template, before it runs, by marks that nobody can guess; the messages it leaves
alone. A name that a template puts together from parts ("<|" + role + "|>") therefore is ordinary
text as well.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hymba_jax.data.tokenizer import Tokenizer
from hymba_jax.errors import HymbaError

MAX_CHARACTERS = 10_000_000  # of a rendered conversation: more than any model reads


def encode(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The prompt for the next answer; it begins with the begin-of-text token, once.

    Args:
      messages: each with a "role" (system, user or assistant) and its "content".

    Raises:
      HymbaError: the tokenizer has no chat template, or its template fails.
    """
    text, special = _render_marked(tokenizer, messages, add_generation_prompt=True)
    # Texts and, between them, the numbers of special tokens.
    parts = special.split(text)
    ids = tokenizer.encode(parts[0]) if parts[0] else []
    for number, part in zip(parts[1::2], parts[2::2], strict=True):
        ids += [int(number), *(tokenizer.encode(part) if part else [])]
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def answer_end(tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop strings and stop tokens: what the template writes after an answer.

    That is a special token (ChatML's "<|im_end|>"), or else the text up to the user's next message
    (the released Hymba's "\\n<extra_id_1>User"); besides, the name of the end-of-text token, which
    models that were trained on it as text do write.

    Raises:
      HymbaError: the tokenizer has no chat template, or its template fails.
    """
    question, answer, reply = (secrets.token_hex(16) for _ in range(3))
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": reply},
    ]
    text, special = _render_marked(tokenizer, messages, add_generation_prompt=False)
    after = text.partition(answer)[2].partition(reply)[0]
    written, *marked = special.split(after)
    if marked and not written.strip():
        return (tokenizer.eos,), (int(marked[0]),)
    return tuple(filter(str.strip, (tokenizer.eos, written.rstrip()))), ()


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    bos: str,
    eos: str,
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as text, rendered as the transformers library does.

    The template can reach nothing but its arguments, and its result is limited; the time and the
    memory that it takes are not.

    Args:
      bos, eos: the names of the begin-of-text and end-of-text tokens.
      add_generation_prompt: whether to end where an answer begins.

    Raises:
      HymbaError: the template is broken, refuses the messages, or does what it must not.
    """
    pieces, characters = [], 0
    try:
        for piece in _compile(template).generate(
            messages=[dict(message) for message in messages],
            bos_token=bos,
            eos_token=eos,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
        ):
            pieces.append(piece)
            characters += len(piece)
            if characters > MAX_CHARACTERS:
                raise TemplateError(f"it writes more than {MAX_CHARACTERS:,} characters")
    except Exception as error:  # a template can raise whatever Python's operators raise
        reason = " ".join(str(error).split()) or type(error).__name__
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise HymbaError(f"the chat template failed{where}: {reason}") from error
    return "".join(pieces)


def _render_marked(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> tuple[str, re.Pattern[str]]:
    """The conversation with marks for special tokens, and the pattern that finds their numbers."""
    if tokenizer.chat_template is None:
        raise HymbaError("the tokenizer has no chat template: use `hymba generate`")
    secret = secrets.token_hex(16)
    marks = {name: f"[{secret}:{number}]" for name, number in tokenizer.special_tokens.items()}
    longest_first = sorted(marks, key=len, reverse=True)
    names = re.compile("|".join(map(re.escape, longest_first)))
    text = render(
        names.sub(lambda name: marks[name[0]], tokenizer.chat_template),
        messages,
        bos=marks[tokenizer.bos],
        eos=marks[tokenizer.eos],
        add_generation_prompt=add_generation_prompt,
    )
    return text, re.compile(rf"\[{secret}:(\d+)\]")


def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: object, indent: int | None = None) -> str:
    """JSON as it is, where Jinja's own filter escapes what HTML would misread."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
