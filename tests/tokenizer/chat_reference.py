"""What transformers makes of conversations, recorded in chat_reference.json.

Recorded with transformers 5.24.0, tokenizers 0.23.3 and Jinja 3.1.6, in an environment that has
transformers, by `python tests/tokenizer/chat_reference.py`. Each recorded prompt is what
`AutoTokenizer.from_pretrained(files).apply_chat_template(messages, tokenize=True)` gives.

The masks are those of `return_assistant_tokens_mask=True`.

A hostile conversation has names of control tokens in its messages, where they must be ordinary
text. Its prompt is recorded with a tokenizer that lacks just these tokens.
"""

import itertools
import json
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

RECORDED = Path(__file__).with_name("chat_reference.json")

TEMPLATES = {
    "chatml": """\
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "llama": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "assembled": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' ~ m.content | trim }} "
        "{{ '<|%s|>' % 'end' }}\n{% endfor %}{{ ['<|', 'assistant', '|>'] | join }}"
    ),
    "generation": (
        "{% macro head(role) %}<|im_start|>{{ role | title }}: {% endmacro %}"
        "{% for m in messages %}{{ head(m.role) }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content.split('</think>')[-1].lstrip() }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m['content'][:40] }} <|im_end|> {% endif %}{% endfor %}"
    ),
    "tools": (
        "{% for tool in tools %}<|user|>{{ tool | tojson(separators=(',', ':'), sort_keys=true) }}"
        "{{ tool | tojson(ensure_ascii=true, indent=1) }}<|end|>{% endfor %}"
        "{% for d in documents %}{{ d.title | upper }}: {{ d.text }}{{ eos_token }}{% endfor %}"
        "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}"
        "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}"
    ),
}

TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Sucht in é."}}]
DOCUMENTS = [{"title": "Of cats", "text": "A cat sat."}, {"title": "b", "text": " x "}]

HELLO = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  Hello world, it is  é \U0001f600 "},
    {"role": "assistant", "content": "<b>Let me see</b>\n\n</think>\n\n Hello!  "},
    {"role": "user", "content": "and_now? 12 345", "tool_calls": None},
]
HOSTILE = [
    {"role": "user", "content": "Hi <x1> and <x2> or a<x3>b, <x3> <X4><x4>  <x1><x1>"},
    {"role": "assistant", "content": "<x2> </think> a <x4><x1>"},
    {"role": "user", "content": "<x1"},
    {"role": "assistant", "content": ">x2> <x3>"},
]
HOSTILE_NAMES = ("<x1>", "<x2>", "<x3>", "<x4>")
_KINDS = (("hello", HELLO, ()), ("hostile", HOSTILE, HOSTILE_NAMES))

TEXT = (
    "".join(message["content"] for message in HELLO + HOSTILE) + "[INST] [/INST] Assistant: "
    "system user assistant <|im_start|>\n" + json.dumps(TOOLS) + "Of cats OF CATS A cat sat."
)


def added_tokens(omit=()):
    """One of each kind; the names of the last four are in hostile messages."""
    tokens = [
        AddedToken("<unk>", special=True),
        AddedToken("<s>", special=True),
        AddedToken("</s>", special=True),
        AddedToken("<|im_start|>", special=True, rstrip=True),
        AddedToken("<|im_end|>", special=False, normalized=False, lstrip=True),
        AddedToken("<|user|>", special=False, normalized=True),
        AddedToken("<|assistant|>", special=True, lstrip=True, rstrip=True),
        AddedToken("<|end|>", special=True, single_word=True),
        AddedToken("  ", special=False, normalized=False),
        AddedToken("<x1>", special=True),
        AddedToken("<x2>", special=False, normalized=False, lstrip=True, rstrip=True),
        AddedToken("<x3>", special=True, single_word=True),
        AddedToken("<x4>", special=False, normalized=True),
    ]
    return [token for token in tokens if token.content not in omit]


def _pieces(text):
    """A vocabulary: characters and the beginnings of words."""
    words = {word[:length] for word in text.split() for length in (1, 2, 3, 5)}
    starts = {"▁" + word for word in words}
    return sorted({"▁", *text.replace(" ", "▁"), *words, *starts})


def _bpe(text, alphabet=()):
    """A BPE that merges from the left, with byte fallback."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if not alphabet else []
    vocabulary = dict.fromkeys(["<unk>", *pieces, *sorted({*alphabet, *text})])
    merges = []
    for word in sorted(set(text.split("\n"))):
        for i in range(1, min(len(word), 6)):
            if word[:i] in vocabulary and word[: i + 1] not in vocabulary:
                vocabulary[word[: i + 1]] = None
                merges.append((word[:i], word[i]))
    return models.BPE(
        {piece: number for number, piece in enumerate(vocabulary)},
        merges,
        unk_token="<unk>",
        byte_fallback=not alphabet,
        fuse_unk=True,
    )


def _byte_level(omit, add_prefix_space):
    split = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    words = "\n".join(word for word, _ in split.pre_tokenize_str(TEXT))
    model = tokenizers.Tokenizer(_bpe(words, pre_tokenizers.ByteLevel.alphabet()))
    model.pre_tokenizer = split
    model.decoder = decoders.ByteLevel()
    return model


def _metaspace(omit, kind, scheme):
    if kind == "unigram":
        names = [name for name in ("<unk>", "<s>", "</s>", "<x1>") if name not in omit]
        pieces = [(name, 0.0) for name in names]
        others = {*_pieces(TEXT)} - {token.content for token in added_tokens()}
        pieces += [(piece, -10.0 + len(piece) ** 1.5) for piece in sorted(others)]
        model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    else:
        model = tokenizers.Tokenizer(_bpe("\n".join("▁" + word for word in TEXT.split())))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind == "unigram")
    model.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return model


def _prepended(omit):
    model = tokenizers.Tokenizer(_bpe("\n".join("▁" + word for word in TEXT.split())))
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return model


def _words(omit, split):
    words = sorted({word for word, _ in split.pre_tokenize_str(TEXT.lower())} - {*HOSTILE_NAMES})
    names = [token.content for token in added_tokens(omit)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*names, *words]))}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    model.pre_tokenizer = split
    return model


TOKENIZERS = {
    "byte level": lambda omit: _byte_level(omit, False),
    "byte level, prefix space": lambda omit: _byte_level(omit, True),
    **{
        f"{kind}, {scheme}": lambda omit, kind=kind, scheme=scheme: _metaspace(omit, kind, scheme)
        for kind in ("bpe", "unigram")
        for scheme in ("first", "always", "never")
    },
    "prepended": _prepended,
    "words": lambda omit: _words(omit, pre_tokenizers.Whitespace()),
    "words between spaces": lambda omit: _words(omit, pre_tokenizers.WhitespaceSplit()),
}


def write_tokenizer(directory, name, template, omit=()):
    """The files of a tokenizer, as a Hugging Face repository has them."""
    model = TOKENIZERS[name](omit)
    model.add_tokens(added_tokens(omit))
    model.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": TEMPLATES[template],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def arguments(template):
    """What a template is given besides messages."""
    options = {"add_generation_prompt": template != "generation"}
    return options | ({"tools": TOOLS, "documents": DOCUMENTS} if template == "tools" else {})


def record():
    """All prompts by tokenizer and template, those of HELLO and those of HOSTILE."""
    from transformers import AutoTokenizer

    prompts = {}
    for name, template in itertools.product(TOKENIZERS, TEMPLATES):
        for kind, messages, omit in _KINDS:
            with tempfile.TemporaryDirectory() as directory:
                write_tokenizer(Path(directory), name, template, omit)
                tokenizer = AutoTokenizer.from_pretrained(directory)
                ids = tokenizer.apply_chat_template(
                    messages, tokenize=True, return_dict=False, **arguments(template)
                )
                if omit:  # the same tokens have other ids there
                    ids = tokenizer.convert_ids_to_tokens(ids)
            prompts[f"{name}; {template}; {kind}"] = ids
    for name, (kind, messages, omit) in itertools.product(TOKENIZERS, _KINDS):
        prompts[f"{name}; generation; {kind} answers"] = _answers(name, messages, omit)
    return prompts


def _answers(name, messages, omit):
    """Which tokens of the prompt are in `{% generation %}` blocks."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory), name, "generation", omit)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        encoded = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **arguments("generation"),
        )
    return encoded["assistant_masks"]


if __name__ == "__main__":
    lines = (f"{json.dumps(key)}: {json.dumps(ids)}" for key, ids in record().items())
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
