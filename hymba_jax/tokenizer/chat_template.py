"""Conversations as the text, and the tokens, that a chat model completes.

A template is a Jinja program that comes with a tokenizer. It writes control tokens by name,
possibly assembled ("<|" + role + "|>"); the same name in a message is ordinary text. To tell them
apart, every character is traced to the template or a message (`traced_text.py`).
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer.control_tokens import ROLE, USER
from hymba_jax.tokenizer.template_sandbox import MAX_CHARACTERS, Sandbox
from hymba_jax.tokenizer.tokenizer import Tokenizer
from hymba_jax.tokenizer.traced_text import Traced, concat, generated_spans, origins, trace

MAX_TEMPLATE = 1_000_000  # characters
MAX_REASON = 300  # characters of what a template says about its failure


class TemplateFailed(HymbaError):
    """A template is broken, refuses the messages, or does what it must not."""


type Message = Mapping[str, Any]
"""A "role" (system, user, assistant, tool) with its "content", and what else a template reads."""


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """The conversation's token ids: those of `apply_chat_template` in the transformers library.

    Only the names of control tokens in messages, tools, documents and variables differ: there they
    are ordinary text.

    Args:
      tools: that the model may call, as JSON schemas.
      documents: for retrieval.
      add_generation_prompt: whether to end where an answer begins.
      variables: further template variables.

    Raises:
      HymbaError: the tokenizer has no chat template, or its template fails.
    """
    text = render_chat(
        tokenizer,
        messages,
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return tokenizer.encode_traced(text, origins(text))


def answer_end(tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop strings and stop tokens: what the template writes after an answer.

    That is a control token (ChatML's "<|im_end|>"), or else the text up to the user's next message
    (the HF checkpoint's "\\n<extra_id_1>User"); besides, the name of the end-of-sequence token,
    which models that were trained on it as text do write.

    Raises:
      HymbaError: the tokenizer has no chat template, or its template fails.
    """
    question, answer, reply = (secrets.token_hex(16) for _ in range(3))
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": reply},
    ]
    text = render_chat(tokenizer, messages, add_generation_prompt=False)
    after = text.partition(answer)[2].partition(reply)[0]
    found = tokenizer.control.find(after, origins(after))
    if found and not after[: found[0].start].strip():
        return (tokenizer.eos,), (found[0].token,)
    written = after[: found[0].start] if found else after
    return tuple(filter(str.strip, (tokenizer.eos, str.__str__(written.rstrip())))), ()


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> Traced:
    """The conversation as text, rendered by the tokenizer's template.

    Args:
      options: as of `render`.

    Raises:
      HymbaError: the tokenizer has no chat template, or its template fails.
    """
    templates = tokenizer.chat_templates
    name = "tool_use" if options.get("tools") is not None and "tool_use" in templates else "default"
    if name not in templates:
        raise HymbaError("the tokenizer has no chat template: give prompts of text")
    return render(templates[name], messages, named_tokens=tokenizer.named_tokens, **options)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    named_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> Traced:
    """The conversation as text, rendered as the transformers library does.

    The template is sandboxed, with limited time and output. What its `{% generation %}` blocks
    write is marked (`traced_text.generated_spans`), unless the template goes on to change it.

    Args:
      named_tokens: names of special tokens, such as {"bos_token": "<s>"}.
      tools, documents, add_generation_prompt, variables: as of `encode`.

    Raises:
      TemplateFailed: it is broken, refuses the messages, or does what it must not.
      HymbaError: it is too long.
    """
    if len(template) > MAX_TEMPLATE:
        raise HymbaError(f"the chat template has more than {MAX_TEMPLATE:,} characters")
    arguments = {
        **named_tokens,
        "messages": [_traced_message(message) for message in messages],
        "tools": trace(tools, USER),
        "documents": trace(documents, USER),
        "add_generation_prompt": add_generation_prompt,
        **trace(variables, USER),
    }
    parts, characters, sandbox = [], 0, Sandbox()
    try:
        for part in sandbox.generate(template, arguments):
            parts.append(part)
            characters += len(part)
            if characters > MAX_CHARACTERS:
                raise TemplateError(f"it writes more than {MAX_CHARACTERS:,} characters")
    except Exception as error:  # templates can raise anything
        reason = " ".join(str(error)[:MAX_REASON].split()) or type(error).__name__
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise TemplateFailed(f"the chat template failed{where}: {reason}") from error
    text = concat(parts)
    if sandbox.num_generated != sum(stop - start for start, stop in generated_spans(text)):
        return Traced(text, origins(text))  # a filter lost where the blocks' text is
    return text


def _traced_message(message: Message) -> dict[str, Any]:
    """The message with null entries removed, as templates expect."""
    if not isinstance(message, Mapping):
        raise HymbaError(f'a message is {message!r}, not a mapping with "role" and "content"')
    return {
        key: trace(value, ROLE if key == "role" else USER)
        for key, value in message.items()
        if value is not None
    }
