import pytest

from hymba_jax.errors import HymbaError
from hymba_jax.inference.tool_calls import ToolCall, parse_tool_calls


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("No call.", "No call.", []),
        (
            '<toolcall> {"name": "add", "arguments": {"a": 1, "b": [2, "</x>"]}} </toolcall>',
            "",
            [ToolCall("add", {"a": 1, "b": [2, "</x>"]})],
        ),
        (
            'Two:\n<toolcall>{"name": "now"}</toolcall>\n<toolcall>{"name": "now"}</toolcall>.',
            "Two:\n\n.",
            [ToolCall("now", {})] * 2,
        ),
        (
            'A <toolcall> is next: <toolcall>{"name": "say", "arguments": {"a": "<toolcall>"}}'
            "</toolcall>",
            "A <toolcall> is next:",
            [ToolCall("say", {"a": "<toolcall>"})],
        ),
    ],
)
def test_calls_and_the_text_around_them(answer, text, calls):
    assert parse_tool_calls(answer) == (text, calls)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('<toolcall> {"name": "add"}', "without </toolcall>"),
        ("<toolcall> add(1) </toolcall>", "not JSON"),
        ('<toolcall> {"arguments": {}} </toolcall>', "without a name"),
        ('<toolcall> {"name": "add", "arguments": [1]} </toolcall>', "arguments that are none"),
        ("<toolcall> [] </toolcall>", "without a name"),
        ('<toolcall> {"name": "\\ud800"} </toolcall>', "without a name"),
        ('<toolcall> {"name": "f", "arguments": {"a": NaN}} </toolcall>', "NaN is no JSON number"),
        ("<toolcall>" + "[" * 100_000 + "</toolcall>", "not JSON"),
    ],
)
def test_what_is_no_call_is_refused(answer, message):
    with pytest.raises(HymbaError, match=message):
        parse_tool_calls(answer)
