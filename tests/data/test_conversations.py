"""Records that are conversations: their formats, and what is wrong with them."""

import io
import json

import pyarrow
import pytest
from data.chat import chat_tokenizer
from pyarrow import parquet

from hymba_jax.data import records
from hymba_jax.data.conversations import Conversations
from hymba_jax.data.documents import read_documents
from hymba_jax.data.formats import read_records
from hymba_jax.data.listing import File
from hymba_jax.data.records import BrokenFile, Problem
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import answers
from hymba_jax.tokenizer.chat_template import render_chat

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.name }};{% endfor %}{% for c in contexts or [] %}({{ c }})"
    "{% endfor %}{% for d in documents or [] %}<{{ d.title }}>{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}>"
    "{% if m.content == 'refuse' %}{{ raise_exception('no!') }}{% endif %}"
    "{{ m.content if m.content is string else m.content[0].text if m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a>{% endif %}"
)
SYSTEM, USER, ANSWER, TOOL = (
    {"role": role, "content": role[0] * 2} for role in ("system", "user", "assistant", "tool")
)
REFUSED = {"role": "user", "content": "refuse"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
AS_TEXT = {"name": "f", "arguments": '{"a": "é"}'}  # as OpenAI's format has it


def called(*calls):
    return [USER, {"role": "assistant", "tool_calls": [*calls]}]


@pytest.fixture(scope="module")
def conversations():
    return Conversations(chat_tokenizer(TEMPLATE), "all", "the template")


def sharegpt(**values):
    return [{"from": role, "value": value} for role, value in values.items()]


GOOD = [
    (
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER], "id": 1},
        "s>ss</s>u>uu</s>a>aa</s>u>uu</s>a>aa</s>",
    ),
    (
        {"conversations": sharegpt(system="S", human="H", gpt="G", tool="T", assistant="g")},
        "s>S</s>u>H</s>a>G</s>t>T</s>a>g</s>",
    ),
    ({"prompt": "p", "completion": "c"}, "u>p</s>a>c</s>"),
    ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, "s>ss</s>u>uu</s>a>aa</s>"),
    ({"messages": [USER, ANSWER], "prompt": "unused"}, "u>uu</s>a>aa</s>"),
    ({"conversations": sharegpt(human="H", gpt="G"), "system": "S"}, "s>S</s>u>H</s>a>G</s>"),
    (
        {
            "messages": [USER, CALL, TOOL, TOOL, ANSWER],
            "tools": [{"name": "f"}],
            "contexts": ["c", "d"],
        },
        'f;(c)(d)u>uu</s>a>[{"name": "f"}]</s>t>tt</s>t>tt</s>a>aa</s>',
    ),
    (
        {"messages": [USER, ANSWER], "tools": '[{"name": "g"}]', "contexts": None},
        "g;u>uu</s>a>aa</s>",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "part"}]}, ANSWER]},
        "u>part</s>a>aa</s>",
    ),
    ({"messages": [USER, ANSWER], "documents": [{"title": "d"}]}, "<d>u>uu</s>a>aa</s>"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": AS_TEXT}]}]},
        'u>uu</s>a>[{"function": {"name": "f", "arguments": {"a": "é"}}}]</s>',
    ),
    *(
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [AS_TEXT | nothing]}]},
            'u>uu</s>a>[{"name": "f", "arguments": {}}]</s>',
        )
        for nothing in ({"arguments": ""}, {"arguments": None})
    ),
]


def test_answers_of_a_prompt_have_no_loss(conversations):
    record = {"prompt": [USER, ANSWER, USER], "completion": "c"}
    chat = conversations.of_json(record)
    assert chat.text == "u>uu</s>a>aa</s>u>uu</s>a>c</s>"
    assert [chat.text[start:stop] for start, stop in chat.answers] == ["c</s>"]
    chat = conversations.of_json({"messages": [USER, ANSWER, USER, ANSWER]})
    assert [chat.text[start:stop] for start, stop in chat.answers] == ["aa</s>"] * 2


@pytest.mark.parametrize(("record", "text"), GOOD)
def test_formats(conversations, record, text):
    (document,) = read_records(
        io.BytesIO(json.dumps([record]).encode()), "chats.json", conversations
    )
    assert document.text == document.chat.text == text
    assert document.name == "chats.json:element 1"
    assert [text[start - 2 : start] for start, _ in document.chat.answers] == ["a>"] * text.count(
        "a>"
    )


def test_what_other_rows_of_a_column_have_is_no_part_of_a_row(conversations):
    """As of the arguments of two tools, whose structs Parquet makes one of."""
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": [{"c": "d"}]}}]
    records = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in calls
    ]
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), file)
    files = {"a.parquet": file.getvalue(), "a.json": json.dumps(records).encode()}
    texts = [
        [document.text for document in read_records(io.BytesIO(content), name, conversations)]
        for name, content in files.items()
    ]
    assert texts[0] == texts[1]
    assert '{"b": [{"c": "d"}]}' in texts[0][1]


def test_parquet(conversations):
    """Where a row lacks a field that others have, it is null."""
    rows = [
        {"messages": [USER, ANSWER], "tools": json.dumps([{"name": "f"}]), "other": 1},
        {"messages": [USER, CALL, TOOL, ANSWER], "contexts": ["c"]},
    ]
    file = io.BytesIO()
    parquet.write_table(
        pyarrow.Table.from_pylist(
            rows,
            pyarrow.schema(
                [
                    (
                        "messages",
                        pyarrow.list_(
                            pyarrow.struct(
                                [
                                    ("role", pyarrow.string()),
                                    ("content", pyarrow.string()),
                                    (
                                        "tool_calls",
                                        pyarrow.list_(pyarrow.struct([("name", pyarrow.string())])),
                                    ),
                                ]
                            )
                        ),
                    ),
                    ("tools", pyarrow.string()),
                    ("contexts", pyarrow.list_(pyarrow.string())),
                    ("other", pyarrow.int64()),
                ]
            ),
        ),
        file,
    )
    file.seek(0)
    assert [document.text for document in read_records(file, "a", conversations)] == [
        "f;u>uu</s>a>aa</s>",
        '(c)u>uu</s>a>[{"name": "f"}]</s>t>tt</s>a>aa</s>',
    ]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([], "not a JSON object"),
        ({"text": "a"}, 'or "prompt" and "completion" (it has: \'text\')'),
        ({"prompt": "p"}, "(it has: 'prompt')"),
        ({"messages": []}, "'messages' is not a list of messages, or empty"),
        ({"conversations": "a"}, "'conversations' is not a list of messages"),
        ({"prompt": "p", "completion": 1}, "'completion' is not a list of messages"),
        ({"messages": ["a"]}, "message 1 is not an object with a role and a content"),
        ({"messages": [{"content": "a"}]}, "message 1 is not an object with a role"),
        (
            {"messages": [USER, {"role": "assistant", "content": 1}]},
            "has a content that is neither",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": " \n"}]},
            "message 2 is an empty answer",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 is an empty answer"),
        ({"conversations": sharegpt(human="a", gpt="")}, "message 2 is an empty answer"),
        ({"messages": [{"role": "user", "text": "a"}, ANSWER]}, "message 1 has no content"),
        ({"prompt": " ", "completion": "a"}, "message 1 is empty"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "message 2 has weight 0"),
        ({"conversations": sharegpt(narrator="a")}, "message 1 has role 'narrator', not one of"),
        ({"messages": [ANSWER]}, "1 is of 'assistant' at the start, where 'system' or 'user'"),
        ({"messages": [USER, USER, ANSWER]}, "2 is of 'user' after 'user', where 'assistant'"),
        ({"messages": [USER, ANSWER, SYSTEM]}, "message 3 is of 'system' after 'assistant'"),
        ({"messages": [USER, TOOL]}, "message 2 is of 'tool' after 'user'"),
        ({"messages": [SYSTEM, USER]}, "no answer: no message is of 'assistant'"),
        ({"messages": [USER, ANSWER, USER]}, "the last message is of 'user', not an answer"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools is a string, but not JSON"),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, "tools is not a list of objects"),
        ({"messages": [USER, ANSWER], "contexts": "c"}, "contexts is not a list of strings"),
        ({"messages": [USER, ANSWER], "documents": ["d"]}, "documents is not a list of objects"),
        ({"messages": [USER, ANSWER], "system": ["s"]}, "system is not a string"),
        (
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": True}},
            "has chat_template_kwargs, which are not supported",
        ),
        ({"messages": [USER, ANSWER | {"tool_calls": "f()"}]}, "2 has tool_calls that are no list"),
        ({"messages": called("f()")}, "message 2 has a tool call without the name of a function"),
        ({"messages": called({"function": {}})}, "message 2 has a tool call without the name"),
        (
            {"messages": called(AS_TEXT | {"arguments": "[1]"})},
            "message 2 calls 'f' with arguments that are a string, but no JSON object (not a JSON",
        ),
        ({"messages": called(AS_TEXT | {"arguments": [1]})}, "'f' with arguments that are no obj"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"messages": [REFUSED, ANSWER]}, "the chat template failed: no!"),
    ],
)
def test_what_is_wrong_with_a_record(conversations, record, problem):
    lines = [json.dumps(each) for each in (GOOD[0][0], record)]
    content = io.BytesIO("\n".join(lines).encode())
    good, bad = read_records(content, "chats.jsonl", conversations)
    assert good.text == GOOD[0][1]
    assert isinstance(bad, Problem)
    assert bad.name == "chats.jsonl:2"
    assert problem in bad.reason
    assert "\n" not in bad.reason


def test_what_a_template_leaves_out_is_not_left_out_silently():
    content = Conversations(chat_tokenizer(), "all", "the template")
    record = {"messages": [USER, ANSWER], "tools": [{"name": "f"}], "contexts": ["c"]}
    with pytest.raises(ValueError, match="does not write tools and contexts: remove the record"):
        content.of_json(record)
    for call in ({"name": "look_up"}, {"function": {"name": "look_up"}}):
        record = {"messages": [USER, ANSWER | {"tool_calls": [call]}]}
        with pytest.raises(ValueError, match="does not write the tool calls of message 2: remove"):
            content.of_json(record)


def leaving_out(old, new):
    assert old in TEMPLATE
    return Conversations(chat_tokenizer(TEMPLATE.replace(old, new)), "all", "the template")


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("{{ m.tool_calls | tojson if m.tool_calls }}", "", "the tool calls of message 3"),
        ("m.tool_calls | tojson", "m.tool_calls[0] | tojson", "the tool calls of message 3"),
        ("in messages %}", "in messages if m.role != 'system' %}", "the content of message 1"),
        ("in messages %}", "in messages if m.role != 'tool' %}", "the content of message 4"),
        ("if m.content }}", "if m.content and not m.tool_calls }}", "the content of message 3"),
    ],
)
def test_what_a_template_leaves_out_of_a_message_is_said(conversations, old, new, part):
    """Though the name of what is called is among the tools, and contents are elsewhere, too."""
    text = {"role": "assistant", "content": [{"type": "text", "text": "aa"}]}
    calls = {"tool_calls": [{"name": "f"}, {"name": "f"}]}
    record = {"messages": [SYSTEM, USER, text | calls, TOOL, ANSWER], "tools": [{"name": "f"}]}
    record["messages"][1] = {"role": "user", "content": "ss tt aa"}
    conversations.of_json(record)
    with pytest.raises(ValueError, match=rf"does not write {part}: remove"):
        leaving_out(old, new).of_json(record)


def test_what_a_template_writes_in_another_way_is_written():
    content = leaving_out("m.tool_calls | tojson", "m.tool_calls | tojson(ensure_ascii=true)")
    chat = content.of_json({"messages": called({"name": "é"})})
    assert chat.text == 'u>uu</s>a>[{"name": "\\u00e9"}]</s>'


def test_bad_records_stop_with_a_line_each_or_are_skipped(conversations, tmp_path):
    path = tmp_path / "chats.jsonl"
    records = [{"messages": [USER]}, {"messages": [USER, ANSWER]}, {"prompt": ""}]
    path.write_text("\n".join(map(json.dumps, records)))
    file = File(path.name, str(path), None)
    with pytest.raises(HymbaError, match="2 problems") as caught:
        list(read_documents([file], conversations))
    first, second, third = str(caught.value).splitlines()
    assert first.startswith(f"{path}: ")
    assert second.startswith(f"  {path}:1: no answer")
    assert third.startswith(f"  {path}:3: no ")
    problems = []
    (document,) = read_documents([file], conversations, "skip", problems.append)
    assert document.text == "u>uu</s>a>aa</s>"
    assert [problem.name for problem in problems] == ["chats.jsonl:1", "chats.jsonl:3"]


def test_a_conversation_is_never_in_pieces(conversations, monkeypatch):
    monkeypatch.setattr(records, "PIECE", 20)
    lines = [json.dumps({"messages": [USER, ANSWER, USER, ANSWER]})]
    (problem,) = read_records(io.BytesIO(lines[0].encode()), "c.jsonl", conversations)
    assert "a conversation of more than 20 characters" in problem.reason


def test_files_that_have_no_conversations(conversations):
    with pytest.raises(BrokenFile, match="no conversations: give"):
        list(read_records(io.BytesIO(b"Hello"), "a.txt", conversations))
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a"], "prompt": ["b"]}), file)
    file.seek(0)
    with pytest.raises(BrokenFile, match="it has: 'text', 'prompt'"):
        list(read_records(file, "a", conversations))


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(HymbaError, match=r"^NAME: has no chat template.*: give the file of one"):
        Conversations(chat_tokenizer(None), "all", "NAME")


def test_what_is_written_is_checked_by_one_rendering_of_each_option_and_one_of_messages(
    conversations, monkeypatch
):
    rendered = []

    def counted(*arguments, **options):
        rendered.append(options)
        return render_chat(*arguments, **options)

    monkeypatch.setattr(answers, "render_chat", counted)

    def count(*messages, **options):
        rendered.clear()
        conversations.of_json({"messages": [*messages], **options})
        return len(rendered)

    plain = [USER, ANSWER] * 5
    alone = count(*plain)
    assert count(*plain, tools=[{"name": "f"}], contexts=["c"]) == alone + 2
    assert count(SYSTEM, *plain) == alone + 1
    assert count(SYSTEM, USER, CALL, TOOL, ANSWER, *plain[2:8]) == alone + 1
