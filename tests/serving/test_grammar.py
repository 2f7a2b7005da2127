"""Answers that follow a grammar: what llguidance allows, whatever the model says."""

import json
import re

import numpy as np
import openai
import pytest
from serving.served import CONTEXT, SLOTS, model, serving

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.inference.tool_calls import parse_tool_calls
from hymba_jax.serving.app import _failure
from hymba_jax.serving.grammar import Grammar, Grammars
from hymba_jax.serving.scheduler import GenerationRequest, Scheduler
from hymba_jax.serving.served_model import ApiOptions

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 23]}, "b": {"type": "array", "items": {"type": "boolean"}}},
    "required": ["a"],
    "additionalProperties": False,
}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "h"}], "max_tokens": 40}
TEXT = {"model": "tiny", "prompt": "a", "max_tokens": 30}


@pytest.fixture(scope="module")
def client():
    with (
        serving(ApiOptions()) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def response_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("seed", range(3))
def test_a_json_schema(client, seed):
    """A random model, at a temperature at which it writes anything, ends where the object does: it
    ends arrays and answers as soon as it may, so that all fit, and likes blanks, which are few."""
    tokenizer = model().tokenizer
    bias = {tokenizer.encode(text)[0]: 90 for text in " \n\t\r"}
    bias |= {tokenizer.encode("]")[0]: 90, tokenizer.eos_id: 90}
    options = CHAT | {"temperature": 3.0, "n": 2, "response_format": response_format(SCHEMA)}
    options["logit_bias"] = {str(token): value for token, value in bias.items()}
    for choice in client.chat.completions.create(**options, seed=seed).choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert value["a"] in (1, 23)
        assert set(value) <= {"a", "b"}


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": r"[0-9]{3}-(x|yz)"}, r"[0-9]{3}-(x|yz)"),
        ({"grammar": 'start: item ("," item)+\nitem: "no" | "yes"'}, r"(no|yes)(,(no|yes))+"),
        ({"json": {"const": "é"}}, r'"é"'),
    ],
)
def test_other_grammars(client, outputs, pattern):
    extra = {"structured_outputs": outputs}
    options = TEXT | {"temperature": 1.5, "logit_bias": {str(model().tokenizer.eos_id): 90}}
    (choice,) = client.completions.create(**options, extra_body=extra).choices
    assert re.fullmatch(pattern, choice.text)
    assert choice.finish_reason == "stop"
    parts = client.completions.create(**options, seed=5, stream=True, extra_body=extra)
    assert re.fullmatch(pattern, "".join(part.choices[0].text for part in parts))


def test_rows_beside_it_are_as_they_were():
    """A row with a grammar, whose mask changes in each step, and rows without, bit for bit."""
    scheduler = Scheduler(model(), slots=SLOTS, decode_steps=4)
    grammar = Grammars(model()).of_regex("(ab)*c")
    free = GenerationRequest([1, 5], SamplingConfig(max_new_tokens=20))
    bound = GenerationRequest(
        [1, 6], SamplingConfig(max_new_tokens=15, temperature=1.0), num_samples=2, grammar=grammar
    )

    def served(*requests):
        outputs = [[] for _ in requests]
        for request, to in zip(requests, outputs, strict=True):
            scheduler.submit(request, to.append)
        while scheduler.has_work:
            scheduler.step()
        return [
            (
                [token for delta in to for token in delta.tokens],
                [value for delta in to for value in delta.log_probs],
                "".join(delta.text for delta in to if delta.sample == 0),
            )
            for to in outputs
        ]

    together = served(bound, free, free)
    assert together[1] == together[2] == served(free)[0]
    assert re.fullmatch("(ab)*(c|a?)", together[0][2])


def test_rows_beside_it_are_delivered_while_the_next_tokens_are_decoded(monkeypatch):
    scheduler, order = Scheduler(model(), slots=SLOTS), []
    decode = scheduler._engine.decode
    monkeypatch.setattr(
        scheduler._engine, "decode", lambda *args: order.append("decode") or decode(*args)
    )
    grammar = Grammars(model()).of_regex("b{9}")
    sampling = SamplingConfig(max_new_tokens=8)
    for name, prompt, follows in (("free", [1, 5], None), ("bound", [1, 6], grammar)):
        request = GenerationRequest(prompt, sampling, grammar=follows)
        scheduler.submit(request, lambda delta, name=name: order.append(name))
    while scheduler.num_running < 2:
        scheduler.step()
    order.clear()
    scheduler.step()
    assert order == ["bound", "decode", "free"]
    while scheduler.has_work:
        scheduler.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_format": response_format({"type": "objec"})}, "the grammar is invalid: "),
        ({"response_format": {"type": "json_schema"}}, "response_format: json_schema is missing"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x"}}},
            'json_schema belongs to the type "json_schema"',
        ),
        ({"response_format": {"type": "x"}}, "response_format.type: 'x' is not served, only"),
        ({"structured_outputs": {"regex": "(a"}}, "the grammar is invalid: "),
        ({"structured_outputs": {"grammar": "start: x"}}, "the grammar is invalid: "),
        (
            {"structured_outputs": {"json": {"$ref": "#"}}},
            "allows no token: NoExtensionBias",
        ),
        ({"structured_outputs": {}}, "names not one of json, regex and grammar"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "exclude each other",
        ),
        (
            {
                "response_format": {"type": "json_object"},
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            "calls tools cannot follow a grammar",
        ),
    ],
)
def test_what_is_refused(client, changes, message):
    extra = {name: changes[name] for name in changes if name == "structured_outputs"}
    known = {name: changes[name] for name in changes if name != "structured_outputs"}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**CHAT | known, extra_body=extra)
    assert message in error.value.body["message"]
    assert "<state>" not in error.value.body["message"]


@pytest.mark.parametrize("at_first", [True, False])
def test_a_grammar_that_no_token_can_follow(at_first):
    """The request ends with an error, and its slot is free; others are served."""
    scheduler, outputs, others = Scheduler(model(), slots=SLOTS), [], []
    (wrong,) = model().tokenizer.encode("z")

    class Broken(Grammar):
        def start(self):
            matcher = super().start()
            matcher.push(wrong)
            return matcher

    grammar = Grammars(model()).of_regex("ab")
    if at_first:
        grammar = Broken(grammar._matcher, *grammar._sizes)
    request = GenerationRequest([1], SamplingConfig(max_new_tokens=CONTEXT // 2), grammar=grammar)
    scheduler.submit(request, outputs.append)
    scheduler.submit(GenerationRequest([1], SamplingConfig(max_new_tokens=3)), others.append)
    if not at_first:
        while not outputs:
            scheduler.step()
        next(iter(scheduler._rows.values())).matcher.push(wrong)  # not what was sampled
    while scheduler.has_work:
        scheduler.step()
    assert _failure(outputs[-1]).status == 400  # the request's fault
    assert str(outputs[-1]).startswith("the grammar allows no token: ")
    assert others[-1].finish_reason
    assert len(scheduler._free) == SLOTS


ARGUMENTS = {
    "f": SCHEMA,
    "g": {
        "$defs": {"pair": {"enum": [[1, 2], {"k": None}]}},
        "properties": {"p": {"$ref": "#/$defs/pair"}},
        "required": ["p"],
        "additionalProperties": False,
    },
}


def walk(grammar, seed, forced=""):
    """A text that a grammar allows, token by token at random, behind one that it has to allow."""
    tokenizer, matcher, rng = model().tokenizer, grammar.start(), np.random.default_rng(seed)
    tokens = tokenizer.encode(forced)
    for token in tokens:
        assert matcher.mask()[token]
        matcher.push(token)
    while not (allowed := matcher.mask())[tokenizer.eos_id]:
        tokens.append(int(rng.choice(np.flatnonzero(allowed))))
        matcher.push(tokens[-1])
    return tokenizer.decode(tokens), allowed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prompt", ["<toolcall>", '<toolcall> {"name": "g", "arguments":'])
def test_demanded_calls_follow_the_schemas(prompt, seed):
    names = ["g"] if "g" in prompt else ["f", "g"]
    schemas = {name: ARGUMENTS[name] for name in names}
    grammar = Grammars(model()).of_tool_calls(schemas, prompt, has_more=len(names) > 1)
    text, allowed = walk(grammar, seed)
    rest, (call,) = parse_tool_calls(prompt + text)
    assert rest == ""
    assert call.name in names
    if call.name == "g":
        assert call.arguments in ({"p": [1, 2]}, {"p": {"k": None}})
    else:
        assert call.arguments["a"] in (1, 23)
        assert call.arguments.keys() <= {"a", "b"}
    assert " </toolcall>" in text
    (line_break,) = model().tokenizer.encode("\n")
    assert allowed[line_break] == (len(names) > 1)  # where another call may follow


def test_strict_calls_in_text_follow_the_schemas():
    """Text is free up to a call, and behind it."""
    grammar = Grammars(model()).of_tool_calls({"f": SCHEMA, "any": {}}, "", has_more=True)
    before = 'A <tool> or {"a": 5}. <toolcall> {"name": "f", "arguments": '
    text, _ = walk(grammar, 0, before + '{"a": 23} </toolcall>'.replace("}", "}}"))
    assert parse_tool_calls(text + " more")[1][0].arguments == {"a": 23}
    tokenizer, matcher = model().tokenizer, grammar.start()
    for wrong in ("{'", '{"a": 5', '{"b'):
        matcher = grammar.start()
        tokens = tokenizer.encode(before + wrong)
        for token in tokens[:-1]:
            matcher.push(token)
        assert not matcher.mask()[tokens[-1]]
    walk(grammar, 0, 'x <toolcall> {"name": "any", "arguments": {"a": 5}} </toolcall> y')


def test_a_random_model_calls_the_tool_that_it_has_to(client):
    """The tool's prompt and the call are nearly all that the context holds."""
    tool = {"type": "function", "function": {"name": "g", "strict": True}}
    end = {str(model().tokenizer.eos_id): 90}
    for choice in ("required", {"type": "function", "function": {"name": "g"}}):
        options = CHAT | {"tools": [tool], "tool_choice": choice, "logit_bias": end}
        del options["max_tokens"]
        (answer,) = client.chat.completions.create(**options, temperature=3.0, seed=1).choices
        (call,) = answer.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("g", "{}")
        assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")


def test_a_tool_whose_schema_is_none(client):
    tool = {"type": "function", "function": {"name": "g", "parameters": {"properties": 5}}}
    with pytest.raises(openai.BadRequestError, match="the grammar is invalid: "):
        client.chat.completions.create(**CHAT, tools=[tool], tool_choice="required")
