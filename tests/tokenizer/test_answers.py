"""What of a conversation the loss is on."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizer.chat_reference import (
    HELLO,
    HOSTILE,
    RECORDED,
    TEMPLATES,
    TOKENIZERS,
    TOOLS,
    write_tokenizer,
)
from tokenizers import models, pre_tokenizers

from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import Tokenizer, build_tokenizer
from hymba_jax.tokenizer.answers import AnswerRenderer, encode_answers
from hymba_jax.tokenizer.chat_template import encode

CONFIGS = Path(__file__).parents[2] / "configs"
HF_FILES = Path(__file__).parents[3] / "shared" / "released"

QUESTION = {"role": "user", "content": "<|im_end|> Hi"}
CALL = {"name": "look_up", "arguments": {"word": "é"}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    QUESTION,
    {"role": "assistant", "content": "Ho é<|im_end|>! "},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "<b></think> C"},
]

# Templates as they are in use, shortened: with tools (ChatML's way), and one that forgets thoughts.
CHATML_TOOLS = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
<tool_call>
{{ call | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FORGETFUL = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip() }}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PROMPTED_LINES = LINES + "{% if add_generation_prompt %}assistant: {% endif %}"
PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def with_template(template):
    """Bytes, and control tokens."""
    model = build_tokenizer("bytes", []).model
    model.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>"])
    model.add_tokens(["<tool_call>", "</tool_call>"])
    return Tokenizer(model, "<s>", "</s>", template)


def answers(tokenizer, messages, loss_on="all", **options):
    """The text of the tokens that the loss is on, which are the whole conversation's."""
    chat = AnswerRenderer(tokenizer, loss_on).render(messages, **options)
    ids, mask = encode_answers(tokenizer, chat)
    assert ids == encode(tokenizer, messages, add_generation_prompt=False, **options)
    runs, before = [], False
    for token, is_answer in zip(ids, mask.tolist(), strict=True):
        if is_answer and not before:
            runs.append([])
        if is_answer:
            runs[-1].append(token)
        before = is_answer
    return [tokenizer.model.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATES["chatml"], ["Ho é<|im_end|>! <|im_end|>", "<b></think> C<|im_end|>"]),
        (TEMPLATES["llama"], [" Ho é<|im_end|>!  </s>", " <b></think> C </s>"]),
        (TEMPLATES["assembled"], ["Ho é<|im_end|>! <|end|>", "<b></think> C <|end|>"]),
        (TEMPLATES["generation"], ["Ho é<|im_end|>! <|im_end|>", "C<|im_end|>"]),
        (PROMPTED_LINES, ["Ho é<|im_end|>! \n", "<b></think> C\n"]),
        (PLAIN, ["Ho é<|im_end|>! \n", "<b></think> C\n"]),
    ],
)
def test_an_answer_ends_with_what_ends_its_turn(template, expected):
    """The names of control tokens in messages are text, and end nothing."""
    tokenizer = with_template(template)
    assert answers(tokenizer, TURNS) == expected
    assert answers(tokenizer, TURNS, "last") == expected[1:]


@pytest.mark.skipif(not HF_FILES.is_dir(), reason="the HF files are not available")
def test_answers_of_the_hf_template():
    tokenizer = Tokenizer.load(HF_FILES)
    options = {"tools": TOOLS, "contexts": ["A cat."]}
    assert answers(tokenizer, TURNS, **options) == ["Ho é<|im_end|>!\n", "<b></think> C\n"]
    assert answers(tokenizer, TURNS, "last", **options) == ["<b></think> C\n"]


def test_the_end_of_sequence_follows_where_answers_end_with_text():
    """Else nothing would end the last one."""
    for template, takes_eos in ((TEMPLATES["chatml"], False), (PROMPTED_LINES, True)):
        chat = AnswerRenderer(with_template(template)).render(TURNS)
        assert chat.takes_eos == takes_eos


def test_calls_of_tools_are_answers_and_their_results_are_not():
    messages = [
        QUESTION,
        {"role": "assistant", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "It is."},
    ]
    call = f"<tool_call>\n{json.dumps(CALL, ensure_ascii=False)}\n</tool_call>"
    expected = [f"{call}{call}<|im_end|>", "It is.<|im_end|>"]
    assert answers(with_template(CHATML_TOOLS), messages) == expected


AS_TEXT = CALL | {"arguments": json.dumps(CALL["arguments"], ensure_ascii=False)}  # as OpenAI's API


def test_the_template_for_tokenizers_without_one():
    tokenizer = with_template(CONFIGS.joinpath("chat.jinja").read_text())
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "U"}]},
        {"role": "assistant", "content": "A", "tool_calls": [CALL, {"function": AS_TEXT}]},
        {"role": "tool", "content": "T"},
        {"role": "assistant", "content": "B"},
    ]
    call = '<toolcall> {"name": "look_up", "arguments": {"word": "é"}} </toolcall>'
    expected = [f"A\n{call}\n{call}</s>", "B</s>"]
    options = {"tools": [{"name": "look_up"}], "contexts": ["C"]}
    assert answers(tokenizer, messages, **options) == expected
    assert tokenizer.model.decode(
        encode(tokenizer, messages, **options), skip_special_tokens=False
    ) == (
        '<s>system\nS\n<tool> {"name": "look_up"} </tool>\n<context> C </context></s>user\nU</s>'
        f"assistant\n{expected[0]}tool\nT</s>assistant\n{expected[1]}assistant\n"
    )
    called = [{**messages[2], "content": None}, *messages[3:]]
    assert answers(tokenizer, [messages[1], *called])[0] == f"{call}\n{call}</s>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_marked_answers_are_those_of_the_transformers_library(tmp_path, name):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    write_tokenizer(tmp_path, name, "generation")
    tokenizer = Tokenizer.load(tmp_path)
    for kind, messages in (("hello", HELLO), ("hostile", HOSTILE)):
        ids, mask = encode_answers(tokenizer, AnswerRenderer(tokenizer).render(messages))
        assert len(ids) == len(recorded[f"{name}; generation; {kind}"])
        assert mask.astype(int).tolist() == recorded[f"{name}; generation; {kind} answers"]
        assert 1 < mask.sum() < len(ids) / 2


def test_a_token_belongs_to_an_answer_if_any_of_its_characters_does():
    vocabulary = {"</s>": 0, "?": 1, "abc": 2, "-": 3, "d": 4}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Split("-", "isolated")
    template = "a{% generation %}b{% endgeneration %}c-{% generation %}d{% endgeneration %}-d"
    tokenizer = Tokenizer(model, None, "</s>", template)
    ids, mask = encode_answers(tokenizer, AnswerRenderer(tokenizer).render(TURNS))
    assert ids == [2, 3, 4, 3, 4]
    assert mask.tolist() == [True, False, True, False, False]


def test_thoughts_that_a_template_forgets_are_trained_on_in_the_last_answer_alone():
    tokenizer = with_template(FORGETFUL)
    messages = [*TURNS[:2], TURNS[4], *TURNS[3:]]
    assert answers(tokenizer, messages, "last") == ["<b></think> C<|im_end|>"]
    with pytest.raises(HymbaError, match="writes message 3, an answer, in another way when others"):
        answers(tokenizer, messages)


def test_thoughts_that_begin_in_the_prompt_begin_every_answer():
    """Only what the model has to write is trained on."""
    tokenizer = with_template(TEMPLATES["chatml"].replace("assistant\\n", "assistant\\n<think>"))
    renderer = AnswerRenderer(tokenizer)
    messages = [QUESTION, {"role": "assistant", "content": "<think>Hm</think>C"}]
    assert answers(tokenizer, messages) == ["Hm</think>C<|im_end|>"]
    with pytest.raises(HymbaError, match="does not begin message 2, an answer, with its gen"):
        renderer.render([QUESTION, {"role": "assistant", "content": "C"}])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (LINES, "writes 'assistant: ' around an answer, whether asked for a generation prompt or"),
        ("{{ messages[-1].content }}", "does not begin message 2, an answer, with its generation"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}A:{% endif %}",
            "does not begin message 3, an answer, with its generation prompt",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "writes nothing of message 2, an answer",
        ),
        (
            "{% filter urlencode %}{% generation %}a b{% endgeneration %}{% endfilter %}",
            "blocks write nothing, or it goes on to",
        ),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}", "blocks write nothing"),
        ("{{ raise_exception('no!') }}", "the chat template failed: no!"),
        (None, "has no chat template"),
    ],
)
def test_templates_of_which_answers_cannot_be_told_are_refused(template, problem):
    with pytest.raises(HymbaError, match=problem):
        AnswerRenderer(with_template(template)).render(TURNS)


def test_a_prompt_that_ends_inside_a_token_is_refused():
    """There " a" is a token; the space of the prompt alone is another."""
    spaced = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    marked = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    joined = build_tokenizer("bpe:262", ["b a a a a a a a a"])
    assert len(joined.encode(" a")) == 1
    for template in (spaced + prompt, marked + prompt):
        tokenizer = Tokenizer(joined.model, "<s>", "</s>", template)
        with pytest.raises(HymbaError, match=r"end of the generation prompt, 'istant: ', to the b"):
            AnswerRenderer(tokenizer)
        fixed = template.replace(": {", ":{").replace("{{ m.content", "{{ ' ' + m.content")
        tokenizer = Tokenizer(joined.model, "<s>", "</s>", fixed)
        assert answers(tokenizer, TURNS)[0].startswith(" Ho")
        prompt_ids = encode(tokenizer, TURNS[:2])
        assert encode(tokenizer, TURNS)[: len(prompt_ids)] == prompt_ids


def test_an_answer_that_begins_inside_a_token_is_refused():
    """There a line break with indentation is a token, and the prompt ends with a line break."""
    joined = build_tokenizer("bpe:262", ["b\n  b\n  b\n  b\n  b"])
    assert len(joined.encode("\n  ")) == 1
    template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    marked = template.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    ).replace("in messages", "in messages if m.role == 'assistant'")
    messages = [QUESTION, {"role": "assistant", "content": "  x = 1"}]
    stripped = [QUESTION, {"role": "assistant", "content": "x = 1"}]
    for each in (template, marked):
        tokenizer = Tokenizer(joined.model, "<s>", "</s>", each)
        with pytest.raises(
            HymbaError, match=r"'istant:.n', to the beginning of an answer, '  x = "
        ):
            AnswerRenderer(tokenizer).render(messages)
        AnswerRenderer(tokenizer).render(stripped)
    tokenizer = Tokenizer(
        joined.model, "<s>", "</s>", template.replace("m.content", "m.content|trim")
    )
    assert answers(tokenizer, messages) == ["x = 1</s>"]


def test_an_answer_that_ends_otherwise_than_others_is_refused():
    template = TEMPLATES["chatml"].replace(
        "+ '<|im_end|>' +", "+ ('' if message['tool_calls'] else '<|im_end|>') +"
    )
    messages = [*TURNS[:2], {**TURNS[2], "tool_calls": [CALL]}]
    with pytest.raises(HymbaError, match=r"does not end message 3, an answer, with <\|im_end\|>"):
        answers(with_template(template), messages)
