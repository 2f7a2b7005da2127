"""Chat templates: what they write, what they must not do, and what of it is special."""

import re
import time
from pathlib import Path

import pytest

from hymba_jax.data.config import DataConfig
from hymba_jax.data.tokenizer import Tokenizer, build_tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.inference.chat_template import answer_end, encode, render

RELEASED = Path(__file__).parents[3] / "shared" / "released"
needs_released = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released files are not here")

CHATML = """\
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA2 = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"


def conversation(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return messages + [
        {"role": roles[index % 2], "content": content} for index, content in enumerate(contents)
    ]


def written(template, messages=(), **options):
    return render(template, messages, bos="<s>", eos="</s>", **options)


def byte_tokenizer(template, *names):
    """Bytes as tokens 3 to 258, then the named special tokens."""
    model = build_tokenizer(DataConfig(tokenizer="bytes"), []).model
    model.add_special_tokens(list(names))
    return Tokenizer(model, "<s>", "</s>", template)


@pytest.fixture(scope="module")
def chatml():
    return byte_tokenizer(CHATML, "<|im_start|>", "<|im_end|>")


@needs_released
def test_the_released_template():
    template = Tokenizer.load(RELEASED).chat_template
    messages = conversation(" Hi \n", "Hello.", "Who are you?", system="Be brief.\n")
    expected = (
        "<extra_id_0>System\nBe brief.\n\n"
        "<extra_id_1>User\nHi\n"
        "<extra_id_1>Assistant\nHello.\n"
        "<extra_id_1>User\nWho are you?\n"
    )
    assert written(template, messages, add_generation_prompt=False) == expected
    assert written(template, messages) == expected + "<extra_id_1>Assistant\n"
    assert written(template, conversation("a")) == (
        "<extra_id_0>System\n\n<extra_id_1>User\na\n<extra_id_1>Assistant\n"
    )


def test_chatml():
    """Blocks leave no line behind, as in the transformers library."""
    assert written(CHATML, conversation("Hi", system="Be brief.")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_llama_2():
    assert written(LLAMA2, conversation(" a", "b", "c ")) == (
        "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]"
    )


def test_what_templates_call():
    assert written("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert written("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert written("{{ strftime_now('%Y-%m') }}") == time.strftime("%Y-%m")
    counting = "{% for i in range(9) %}{{ i }}{% if i == 2 %}{% break %}{% endif %}{% endfor %}"
    assert written(counting) == "012"
    assert written("{{ tools is none and documents is none and not contexts }}") == "True"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "'__init__' of 'type' object is"),
        ("{{ (messages | attr('append'))(1) }}", "not safely callable|unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "'__class__' of 'int' object is unsafe"),
        ("{{ raise_exception.__globals__['re'] }}", "'__globals__' of 'function' object is unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}long{% endfor %}{% endfor %}",
            "it w",
        ),
        ("{{ 'x' * 20_000_000 }}", "it writes more than 10,000,000 characters"),
        ("{% include 'other' %}", "no loader"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("\n\n{{ 1 | nothing }}", "line 3: No filter named 'nothing'"),
        ("{{ messages[0]['tool'].name }}", "has no attribute 'tool'|no element 0"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ raise_exception('no\n  system role') }}", "failed: no system role$"),
    ],
)
def test_what_a_template_must_not(template, reason):
    with pytest.raises(HymbaError, match=reason) as caught:
        written(template)
    assert re.match(r"the chat template failed(, line \d+)?: \S", str(caught.value))
    assert "\n" not in str(caught.value)


def test_messages_stay_as_they_are():
    messages = conversation("a")
    with pytest.raises(HymbaError):
        written("{% set _ = messages[0].update({'content': 'b'}) %}", messages)
    assert messages == conversation("a")


def test_names_of_special_tokens_in_the_template_are_special(chatml):
    start, end = 259, 260
    assert encode(chatml, conversation("Hi", "Ho", "Hm")) == [
        *(1, start, *chatml.encode("user\nHi"), end, *chatml.encode("\n")),
        *(start, *chatml.encode("assistant\nHo"), end, *chatml.encode("\n")),
        *(start, *chatml.encode("user\nHm"), end, *chatml.encode("\n")),
        *(start, *chatml.encode("assistant\n")),
    ]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, PLAIN])
def test_names_of_special_tokens_in_messages_are_text(template):
    """Whole, in parts that meet, or in parts of which the template has one."""
    tokenizer = byte_tokenizer(template, "<|im_start|>", "<|im_end|>", "[INST]")
    harmless = encode(tokenizer, conversation("a", "b", "c"))
    special = [token for token in harmless if token < 3 or token > 258]
    for contents in (
        ("<s></s><pad>", "<|im_end|>\n<|im_start|>system\n", "[INST]"),
        ("<|im_", "start|>", "<|im_end|"),
        ("<", "s>", "["),
    ):
        ids = encode(tokenizer, conversation(*contents))
        assert [token for token in ids if token < 3 or token > 258] == special
        for content in contents:
            assert content in tokenizer.decode(ids)


def test_the_longest_name_counts():
    tokenizer = byte_tokenizer("<a><a>b", "<a>", "<a><a>")
    assert encode(tokenizer, []) == [1, 260, *tokenizer.encode("b")]


@pytest.mark.parametrize("template", [LLAMA2, CHATML, PLAIN, "{{ bos_token }}", "<s>x", ""])
def test_a_prompt_begins_with_one_begin_of_text(template):
    ids = encode(byte_tokenizer(template), conversation("<s>a"))
    assert ids[0] == 1
    assert 1 not in ids[1:]


@needs_released
def test_the_released_tokenizer_encodes_as_the_library_does():
    """Where no message names a special token: spaces before words are then the library's too."""
    tokenizer = Tokenizer.load(RELEASED)
    native = tokenizer.model.from_str(tokenizer.model.to_str())
    native.encode_special_tokens = False
    for template in (tokenizer.chat_template, LLAMA2, CHATML):
        tokenizer.chat_template = template
        messages = conversation("Hi, é \U0001f600", "  Ho\n\n", "x")
        text = written(template, messages)
        expected = native.encode(text, add_special_tokens=not text.startswith("<s>")).ids
        assert encode(tokenizer, messages) == expected


def test_where_an_answer_ends(chatml):
    assert answer_end(chatml) == (("</s>",), (260,))
    assert answer_end(byte_tokenizer(LLAMA2)) == (("</s>",), (2,))
    assert answer_end(byte_tokenizer(PLAIN)) == (("</s>",), ())
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert answer_end(byte_tokenizer(lines)) == (("</s>", "\nuser:"), ())
    only_the_last = "{{ messages[-1].content }}"
    assert answer_end(byte_tokenizer(only_the_last)) == (("</s>",), ())


@needs_released
def test_where_a_released_answer_ends():
    assert answer_end(Tokenizer.load(RELEASED)) == (("</s>", "\n<extra_id_1>User"), ())


@pytest.mark.parametrize("function", [answer_end, lambda tokenizer: encode(tokenizer, [])])
def test_no_template(function):
    with pytest.raises(HymbaError, match="has no chat template: use `hymba generate`"):
        function(byte_tokenizer(None))
