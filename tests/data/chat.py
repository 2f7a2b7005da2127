"""A tokenizer with a chat template, and conversations as records."""

import json

from hymba_jax.tokenizer import Tokenizer, build_tokenizer

# The end-of-sequence token ends a turn.
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a>{% endif %}"
)


def chat_tokenizer(template=TEMPLATE):
    """Bytes as tokens 3 to 258, behind `</s>` as token 2."""
    return Tokenizer(build_tokenizer("bytes", []).model, "<s>", "</s>", template)


def record(*contents):
    """Messages of user and assistant in turns."""
    roles = ("user", "assistant")
    messages = [
        {"role": roles[index % 2], "content": content} for index, content in enumerate(contents)
    ]
    return {"messages": messages}


def write_lines(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def expected_tokens(record, loss_on="all"):
    """The ids of a record, and the mask, from its messages by hand."""
    tokenizer, ids, mask = chat_tokenizer(), [], []
    for number, message in enumerate(record["messages"]):
        header = tokenizer.encode(f"{message['role'][0]}>")
        content = [*tokenizer.encode(message["content"]), 2]
        is_last = number == len(record["messages"]) - 1
        is_trained = message["role"] == "assistant" and (is_last or loss_on == "all")
        ids += [*header, *content]
        mask += [False] * len(header) + [is_trained] * len(content)
    return ids, mask
