"""What clients are told of deltas."""

from types import SimpleNamespace

import pytest

from hymba_jax.inference.completion_stream import Delta, EndToken
from hymba_jax.inference.tool_calls import END
from hymba_jax.serving.answers import ChatFormat
from hymba_jax.tokenizer import build_tokenizer

NUMBER = 7  # of the token that ends a call, where there is one


@pytest.mark.parametrize(
    ("names", "ending"),
    [({}, {"stop_string": END}), ({END: NUMBER}, {"end": EndToken(NUMBER, -0.5, [], 40)})],
)
def test_the_end_of_a_call_is_a_string_or_a_token(names, ending):
    tokenizer = SimpleNamespace(control=SimpleNamespace(ids=names))
    answer = ChatFormat(tokenizer, log_probs=False, has_tools=True, closes_call=True)
    text = '<toolcall> {"name": "add", "arguments": {"a": 1}} '
    choice = answer.whole(0, Delta(0, 0, text, [1], [-0.5], "stop", **ending))
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None


def said(text, reason, **options):
    """The content and the names of the calls of an answer; in one piece and in chunks the same."""
    tokenizer = SimpleNamespace(control=SimpleNamespace(ids={}))
    whole, stream = (
        ChatFormat(tokenizer, log_probs=False, has_tools=True, **options) for _ in range(2)
    )
    message = whole.whole(0, Delta(0, 0, text, [], [], reason))["message"]
    parts = [Delta(0, 0, character, [], [], None) for character in text]
    chunks = [stream.chunk(0, part) for part in [*parts, Delta(0, 0, "", [], [], reason)]]
    deltas = [chunk["delta"] for chunk in chunks if chunk]
    content = "".join(delta.get("content", "") for delta in deltas)
    calls = [
        [call["function"]["name"] for call in calls]
        for calls in (
            message.get("tool_calls", []),
            [call for delta in deltas for call in delta.get("tool_calls", [])],
        )
    ]
    assert (content, calls[1]) == (message["content"] or "", calls[0])
    return content, calls[0]


@pytest.mark.parametrize(
    "begun", ["<tool", "<toolcall>", ' <toolcall> {"name": "add", "arguments": {"a": 1}} </tool']
)
def test_a_call_that_is_cut_off_is_left_out(begun):
    """And not one that merely begins like one when the answer ends by itself."""
    call = '<toolcall> {"name": "add", "arguments": {"a": 1}} </toolcall>'
    assert said(f"Well.{begun}", "length") == ("Well.", [])
    assert said(f"{call}\n{begun}", "length") == ("", ["add"])
    assert said("", "length", forced=begun.strip()) == ("", [])
    assert said(f"Well.{begun}", "stop") == (f"Well.{begun}", [])
    assert said("A <b> or <toolcall> is \n", "length") == ("A <b> or <toolcall> is \n", [])


def test_bytes_of_tokens_that_are_a_part_of_a_character():
    """With which clients can join them."""
    tokenizer = build_tokenizer("bytes", [])
    answer = ChatFormat(tokenizer, log_probs=True, has_tools=False)
    choice = answer.whole(0, Delta(0, 0, "é", tokenizer.encode("é"), [-0.5, -0.25], "stop"))
    assert [token["bytes"] for token in choice["logprobs"]["content"]] == [[0xC3], [0xA9]]
