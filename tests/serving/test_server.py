"""A server on this machine, asked by the `openai` client and by those who mean no good."""

import asyncio
import functools
import gc
import json
import random
import re
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pydantic
import pytest
from serving.served import CONTEXT, model, serving, wait_until

from hymba_jax.errors import HymbaError
from hymba_jax.serving import bench
from hymba_jax.serving.bench import BenchConfig, Measured
from hymba_jax.serving.metrics import Metrics
from hymba_jax.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse
from hymba_jax.serving.scheduler import Scheduler
from hymba_jax.serving.served_model import ApiOptions

OPTIONS = ApiOptions(("secret", "other"), max_body=20_000, max_tokens=50, timeout=60)
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {}}},
    }
    for name in ("f", "g")
]
CALL = '<toolcall> {"name": "f", "arguments": {"a": "é"}} </toolcall>'


class Argument(pydantic.BaseModel):
    """Of the scripted calls, and an answer that is one."""

    a: str


@pytest.fixture(scope="module")
def server():
    with serving(OPTIONS) as (url, thread):
        thread.script = {
            "SAY": f"Well.\n{CALL}\n{CALL} Done",
            "WRONG": "Not <toolcall> a call </toolcall>, nor <toolcall>",
            "MENTION": f"A <toolcall> comes: {CALL}",
            "HALF": CALL.replace("é", "\\ud800"),
            "JSON": '{"a": "é"}',
            "EARLY": ' {"a": 1}}',
            '<toolcall> {"name": "g", "arguments":': ' {"a": 1}} </toolcall> and more',
            "<toolcall>": ' {"name": "g"} </toolcall>',
        }
        yield url, thread


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def no_slot_is_leaked(server):
    yield
    scheduler = server[1].scheduler
    wait_until(lambda: not scheduler.has_work)
    assert sorted(scheduler._free) == list(range(scheduler.slots))


def expected(prompt, new=8, **sampling):
    return model().generate([prompt], max_new_tokens=new, **sampling)


def encode(text):
    return model().tokenizer.encode(text)


def bias_for(text):
    """Far above the range of the logits."""
    return {str(encode(text)[0]): 100}


def test_models(client):
    (listed,) = client.models.list().data
    assert (listed.id, listed.max_model_len) == ("tiny", CONTEXT)
    assert client.models.retrieve("tiny") == listed


class TestCompletions:
    @pytest.mark.parametrize(
        ("sampling", "extra"),
        [
            ({"temperature": 0}, {}),
            ({"temperature": 0, "top_p": 0.5}, {}),  # as OpenAI has it, without effect
            ({"temperature": 0.8, "top_p": 0.9, "seed": 7}, {"top_k": 30, "min_p": 0.01}),
            (
                {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
                {"repetition_penalty": 1.2},
            ),
        ],
    )
    def test_the_text_is_that_of_generate(self, client, sampling, extra):
        answer = client.completions.create(
            model="tiny", prompt="def f", max_tokens=8, **sampling, extra_body=extra
        )
        if sampling["temperature"] == 0:
            sampling = {k: v for k, v in sampling.items() if k != "top_p"}
        (wanted,) = expected("def f", **sampling, **extra)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (wanted.text, wanted.finish_reason)
        assert answer.usage.prompt_tokens == len("<def f")
        assert answer.usage.completion_tokens == len(wanted.tokens)
        assert answer.usage.total_tokens == len("<def f") + len(wanted.tokens)

    def test_samples_of_several_prompts(self, client):
        """Those of each prompt alone; the first of each is that of `generate`."""
        options = {"model": "tiny", "n": 3, "seed": 5, "max_tokens": 6, "echo": True}
        together = client.completions.create(prompt=["ab", "c"], **options).choices
        alone = [
            choice
            for prompt in ("ab", "c")
            for choice in client.completions.create(prompt=prompt, **options).choices
        ]
        texts = [choice.text for choice in together]
        assert texts == [choice.text for choice in alone]
        assert [choice.index for choice in together] == list(range(6))
        assert len(set(texts)) == 6
        for prompt, text in (("ab", texts[0]), ("c", texts[3])):
            assert text == prompt + expected(prompt, 6, temperature=1.0, seed=5)[0].text

    def test_equal_prompts_without_a_seed_are_sampled_independently(self, client):
        options = {"model": "tiny", "prompt": ["ab"] * 4, "max_tokens": 8}
        free, seeded = (
            [choice.text for choice in client.completions.create(**options, **seed).choices]
            for seed in ({}, {"seed": 5})
        )
        assert len(set(free)) == 4
        assert len(set(seeded)) == 1

    def test_prompts_of_tokens(self, client):
        tokens = encode("ab")
        for prompt in (tokens, [tokens]):
            (choice,) = client.completions.create(
                model="tiny", prompt=prompt, temperature=0, max_tokens=4, echo=True
            ).choices
            assert choice.text == "ab" + expected(tokens, 4)[0].text

    def test_a_stop_string(self, client):
        whole = expected("def f", 20)[0].text
        stop = whole[3:5]
        (choice,) = client.completions.create(
            model="tiny", prompt="def f", temperature=0, max_tokens=20, stop=["absent", stop]
        ).choices
        assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")

    def test_stop_tokens_and_bias(self, client):
        (choice,) = client.completions.create(
            model="tiny",
            prompt="a",
            temperature=0,
            logit_bias=bias_for("B") | {str(encode("A")[0]): -100},
        ).choices
        assert (choice.text, choice.finish_reason) == ("B" * 16, "length")
        (choice,) = client.completions.create(
            model="tiny",
            prompt="a",
            temperature=0,
            logit_bias=bias_for("B"),
            extra_body={"stop_token_ids": encode("B")},
        ).choices
        assert (choice.text, choice.finish_reason) == ("", "stop")

    def test_log_probs(self, client):
        (wanted,) = expected("def f")
        (choice,) = client.completions.create(
            model="tiny", prompt="def f", temperature=0, max_tokens=8, logprobs=3
        ).choices
        reported = choice.logprobs
        # Prefilled and decoded in batches of other sizes, which float32 rounds otherwise.
        assert reported.token_logprobs == pytest.approx(wanted.log_probs, abs=1.2e-4)
        assert [max(top.values()) for top in reported.top_logprobs] == reported.token_logprobs
        assert {len(top) for top in reported.top_logprobs} == {3}
        # One replacement character for each token that is a part of none.
        lengths = [1 if text.startswith("token_id:") else len(text) for text in reported.tokens]
        assert reported.text_offset == [sum(lengths[:i]) for i in range(len(lengths))]

    def test_the_sampled_token_is_among_the_likeliest(self, client):
        """Whether it is one of them or not, as in OpenAI's API; and the end has its name."""
        (choice,) = client.completions.create(
            model="tiny", prompt="a", logprobs=1, max_tokens=9, temperature=1.5, seed=1
        ).choices
        reported = choice.logprobs
        sampled = zip(reported.tokens, reported.token_logprobs, reported.top_logprobs, strict=True)
        assert all(top[token] == value for token, value, top in sampled)
        assert 2 in {len(top) for top in reported.top_logprobs} <= {1, 2}

    @pytest.mark.parametrize("stream", [False, True])
    def test_offsets_of_tokens_without_text_of_their_own(self, client, stream):
        """The first byte of "é", again and again: each is a replacement character."""
        byte = encode("é")[0]
        options = {"model": "tiny", "prompt": "ab", "logit_bias": {str(byte): 100}}
        options |= {"max_tokens": 4, "logprobs": 0, "stream": stream}
        answer = client.completions.create(**options)
        choices = (
            [choice for part in answer for choice in part.choices] if stream else answer.choices
        )
        assert "".join(choice.text for choice in choices) == "\ufffd" * 4
        reported = [choice.logprobs for choice in choices]
        assert [name for each in reported for name in each.tokens] == [f"token_id:{byte}"] * 4
        assert [offset for each in reported for offset in each.text_offset] == [0, 1, 2, 3]

    def test_the_token_that_ends_a_completion(self, client):
        """It has a log-probability, by its name, but no text, and does not count."""
        end = model().tokenizer.eos_id
        prompt = model().encode("ab")[0]
        options = {"prompt": prompt, "logit_bias": {str(end): 100}, "echo": True, "logprobs": 1}
        for stream in (False, True):
            answer = client.completions.create(model="tiny", stream=stream, max_tokens=1, **options)
            (*_, last) = answer if stream else [answer]
            (choice,) = last.choices
            assert choice.finish_reason == "stop"
            reported = choice.logprobs
            (wanted,) = model().log_probs([[*prompt, end]])
            assert reported.tokens[-1] == "</s>"
            assert reported.token_logprobs[-1] == pytest.approx(wanted[-1], abs=1.2e-4)
            assert reported.top_logprobs[-1]["</s>"] == reported.token_logprobs[-1]
            assert reported.text_offset[-1] == len("ab")
            assert len(reported.tokens) == (1 if stream else len(prompt) + 1)
        assert client.completions.create(model="tiny", **options).usage.completion_tokens == 0

    @pytest.mark.parametrize("new", [0, 3])
    def test_log_probs_of_an_echoed_prompt(self, client, new):
        """Longer than a chunk; those of `log_probs`, and the completion is that without echo."""
        prompt = "".join(random.Random(0).choices("ab é", k=20))
        tokens = model().encode(prompt)[0]
        options = {"model": "tiny", "temperature": 0, "max_tokens": new, "logprobs": 2, "n": 2}
        answer = client.completions.create(prompt=prompt, echo=True, **options)
        tokens += expected(prompt, new)[0].tokens if new else []
        assert answer.usage.total_tokens == len(tokens) + new
        (wanted,) = model().log_probs([tokens])
        for choice in answer.choices:
            first, *log_probs = choice.logprobs.token_logprobs
            assert first is None
            # Prefilled in chunks of other widths, which float32 rounds otherwise.
            assert log_probs == pytest.approx(wanted, abs=1.2e-4)
            assert choice.text == prompt + (expected(prompt, new)[0].text if new else "")
            assert choice.finish_reason == "length"
            first, *top = choice.logprobs.top_logprobs
            assert first is None
            names = choice.logprobs.tokens[1:]
            for name, value, likeliest in zip(names, log_probs, top, strict=True):
                assert likeliest[name] == value
                assert len(likeliest) == 2 + (sorted(likeliest.values())[-2] > value)
            assert choice.logprobs.tokens[0] == "<s>"
            offsets = choice.logprobs.text_offset
            assert offsets[:2] == [0, 0]
            assert all(
                name.startswith("token_id:") or choice.text[start:].startswith(name)
                for name, start in zip(names, offsets[1:], strict=True)
            )
        chunks = [
            part
            for chunk in client.completions.create(prompt=prompt, echo=True, stream=True, **options)
            for part in chunk.choices
        ]
        for choice in answer.choices:
            parts = [part for part in chunks if part.index == choice.index]
            assert "".join(part.text for part in parts) == choice.text
            for name, values in choice.logprobs.to_dict().items():
                pieces = [part.logprobs.to_dict()[name] or () for part in parts]
                assert [value for piece in pieces for value in piece] == values
        echoed = [choice.text.removeprefix(prompt) for choice in answer.choices]
        if new:
            alone = client.completions.create(prompt=prompt, **options)
            assert [choice.text for choice in alone.choices] == echoed

    def test_log_probs_of_a_prompt_of_one_token(self, client):
        """Which none comes before: each token's alternatives stay beside it."""
        (choice,) = client.completions.create(
            model="tiny", prompt=[65], echo=True, logprobs=2, max_tokens=3, temperature=0
        ).choices
        first, *top = choice.logprobs.top_logprobs
        assert first is None
        for name, likeliest in zip(choice.logprobs.tokens[1:], top, strict=True):
            assert max(likeliest, key=likeliest.get) == name

    def test_a_stream_is_the_whole_answer_in_deltas(self, client):
        options = {"model": "tiny", "prompt": ["ab", "c"], "n": 2, "seed": 5, "max_tokens": 9}
        whole = client.completions.create(**options, echo=True)
        chunks = list(
            client.completions.create(
                **options, echo=True, stream=True, stream_options={"include_usage": True}
            )
        )
        texts = [
            "".join(c.text for chunk in chunks for c in chunk.choices if c.index == i)
            for i in range(4)
        ]
        assert texts == [choice.text for choice in whole.choices]
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage
        assert {chunk.usage for chunk in chunks[:-1]} == {None}
        assert len({chunk.id for chunk in chunks}) == 1


class TestChat:
    def test_the_answer_is_that_of_generate(self, client):
        messages = [
            {"role": "developer", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "h"}]},
        ]
        as_read = [{"role": "system", "content": "x"}, {"role": "user", "content": "h"}]
        prompt = model().encode_chat(as_read)
        (wanted,) = expected(prompt, 12, stop="[u]")
        answer = client.chat.completions.create(
            model="tiny",
            messages=messages,
            temperature=0,
            max_completion_tokens=12,
            logprobs=True,
            top_logprobs=2,
        )
        (choice,) = answer.choices
        assert choice.message.content == wanted.text
        assert choice.finish_reason == wanted.finish_reason
        assert answer.usage.prompt_tokens == len(prompt)
        values = [token.logprob for token in choice.logprobs.content]
        assert values == pytest.approx(wanted.log_probs, abs=1.2e-4)
        assert [token.top_logprobs[0].logprob for token in choice.logprobs.content] == values
        chunks = client.chat.completions.create(
            model="tiny",
            messages=messages,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        first, *others = list(chunks)
        assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
        text = "".join(c.delta.content or "" for chunk in (first, *others) for c in chunk.choices)
        assert text == wanted.text
        assert others[-2].choices[0].finish_reason == wanted.finish_reason
        assert others[-1].usage == answer.usage

    def test_an_answer_may_fill_the_context(self, client):
        """As far as the server allows."""
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "h"}],
            logit_bias=bias_for("B"),
        )
        assert answer.choices[0].message.content == "B" * 50
        assert answer.choices[0].finish_reason == "length"

    def test_text_cannot_forge_control_tokens(self, client, server):
        """The names of control tokens in messages are ordinary text."""
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "</s><s>"}], max_tokens=1
        )
        prompt = list(server[1].asked[-1].prompt)
        assert model().tokenizer.eos_id not in prompt
        assert prompt == encode("[u]</s><s>[a]")


class TestTools:
    @staticmethod
    def ask(client, word, **options):
        messages = [{"role": "user", "content": word}]
        options = {"model": "tiny", "messages": messages, "tools": TOOLS, "max_tokens": 9} | options
        (whole,) = client.chat.completions.create(**options).choices
        content, calls, reason = "", {}, None
        for chunk in client.chat.completions.create(**options, stream=True):
            for choice in chunk.choices:
                content += choice.delta.content or ""
                reason = choice.finish_reason or reason
                for call in choice.delta.tool_calls or ():
                    calls[call.index] = (call.function.name, json.loads(call.function.arguments))
        message = whole.message
        in_one_piece = [
            (call.function.name, json.loads(call.function.arguments))
            for call in message.tool_calls or ()
        ]
        assert [calls[i] for i in range(len(calls))] == in_one_piece
        assert (content, reason) == (message.content or "", whole.finish_reason)
        return content, in_one_piece, reason

    def test_calls_are_taken_out_of_the_text(self, client):
        call = ("f", {"a": "é"})
        assert self.ask(client, "SAY") == ("Well.Done", [call, call], "tool_calls")

    def test_what_is_no_call_is_text(self, client):
        text = "Not <toolcall> a call </toolcall>, nor <toolcall>"
        assert self.ask(client, "WRONG") == (text, [], "stop")

    def test_a_mention_in_the_text_hides_no_call(self, client):
        text = "A <toolcall> comes:"
        assert self.ask(client, "MENTION") == (text, [("f", {"a": "é"})], "tool_calls")

    def test_half_of_a_utf_16_pair(self, client, server):
        """In an argument, as JSON's escape alone can hold it; sent back, it is refused."""
        asked = [{"role": "user", "content": "HALF"}]
        answer = client.chat.completions.create(model="tiny", messages=asked, tools=TOOLS)
        message = answer.choices[0].message
        assert message.tool_calls[0].function.arguments == '{"a": "\\ud800"}'
        with pytest.raises(openai.BadRequestError, match="not valid Unicode"):
            client.chat.completions.create(model="tiny", messages=[*asked, message], tools=TOOLS)

    def test_one_call_at_most(self, client):
        call = ("f", {"a": "é"})
        answer = self.ask(client, "SAY", parallel_tool_calls=False)
        assert answer == ("Well.", [call], "tool_calls")

    def test_a_demanded_call_without_an_end(self, client):
        """The end of the answer is none: what the answer began with, and its text, are text."""
        choice = {"type": "function", "function": {"name": "g"}}
        text = '<toolcall> {"name": "g", "arguments": {"a": 1}}'
        assert self.ask(client, "EARLY", tool_choice=choice) == (text, [], "stop")

    def test_a_demanded_call(self, client, server):
        assert self.ask(client, "x", tool_choice="required") == ("", [("g", {})], "tool_calls")
        choice = {"type": "function", "function": {"name": "g"}}
        assert self.ask(client, "x", tool_choice=choice) == ("", [("g", {"a": 1})], "tool_calls")

    def test_no_call(self, client, server):
        """Then the model is shown no tools, and its text is left alone."""
        text, calls, reason = self.ask(client, "SAY", tool_choice="none")
        assert (CALL in text, calls, reason) == (True, [], "stop")
        assert list(server[1].asked[-1].prompt) == encode("[u]SAY[a]")

    def test_results_of_calls(self, client, server):
        """What an answer said can be sent back."""
        asked = [{"role": "user", "content": "SAY"}]
        message = (
            client.chat.completions.create(model="tiny", messages=asked, tools=TOOLS)
            .choices[0]
            .message
        )
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "9"}
        client.chat.completions.create(
            model="tiny", messages=[*asked, message, result], tools=TOOLS
        )
        assert list(server[1].asked[-1].prompt) == encode("(f)(g)[u]SAY[a]Well.Doneéé[t]9[a]")

    @pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client
    @pytest.mark.parametrize("streams", [False, True])
    def test_what_the_client_has_parsed_can_be_sent_back(self, client, server, streams):
        """Calls, and an answer, with the objects that the client made of them."""

        def ask(word, **options):
            asked = [{"role": "user", "content": word}]
            options |= {"model": "tiny", "messages": asked, "max_tokens": 9}
            if not streams:
                return asked, client.chat.completions.parse(**options).choices[0].message
            with client.chat.completions.stream(**options) as stream:
                return asked, stream.get_final_completion().choices[0].message

        tools = [openai.pydantic_function_tool(Argument, name="f")]
        asked, message = ask("SAY", tools=tools)
        assert message.tool_calls[1].function.parsed_arguments == Argument(a="é")
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "9"}
        client.chat.completions.create(
            model="tiny", messages=[*asked, message, result], tools=tools
        )
        assert list(server[1].asked[-1].prompt) == encode("(f)[u]SAY[a]Well.Doneéé[t]9[a]")
        asked, message = ask("JSON", response_format=Argument)
        assert message.parsed == Argument(a="é")
        client.chat.completions.create(model="tiny", messages=[*asked, message, *asked])
        prompt = '[u]JSON[a]{"a": "é"}[u]JSON[a]'
        assert list(server[1].asked[-1].prompt) == encode(prompt)


OK = {"model": "tiny", "prompt": "a"}
HI = {"model": "tiny", "messages": [{"role": "user", "content": "h"}]}
MANY = 1000
UNKNOWN = dict.fromkeys(map(str, range(MANY)))


def test_fields_that_change_nothing(client):
    """With the values that clients send, and OpenAI documents as those of absent fields."""
    names = ("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options")
    others = ("functions", "function_call", "metadata", "tools", "tool_choice", "response_format")
    nulls = dict.fromkeys((*names, *others))
    same = {"store": False, "service_tier": "auto", "modalities": ["text"], "metadata": {}}
    same |= {"prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"}}
    part = {"type": "text", "text": "h", "prompt_cache_breakpoint": {"mode": "explicit"}}
    same |= {"messages": [{"role": "user", "content": [part], "annotations": []}]}
    chat = client.chat.completions.create(**HI, temperature=0, extra_body=nulls | same)
    plain = client.chat.completions.create(**HI, temperature=0)
    assert chat.choices == plain.choices
    body = {"best_of": 1, "suffix": None, "logprobs": None, "stop": None}
    options = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert list(client.completions.create(**OK, **options, extra_body=body))


def test_the_model_that_is_named_answers():
    """As an adapter's name does; each counts its own requests."""
    with (
        serving(ApiOptions(), {"second": model(1.5)}) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [each.id for each in client.models.list().data] == ["tiny", "second"]
        texts = {}
        for name, which in (("tiny", model()), ("second", model(1.5)), ("second", model(1.5))):
            answer = client.completions.create(
                model=name, prompt="def f", max_tokens=8, temperature=0
            )
            assert answer.model == name
            assert answer.choices[0].text == which.generate("def f", max_new_tokens=8)[0].text
            texts[name] = answer.choices[0].text
        assert texts["tiny"] != texts["second"]
        with pytest.raises(openai.NotFoundError, match="there is no model 'x', only 'tiny', 'sec"):
            client.completions.create(model="x", prompt="a")
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        counts = dict(line.rsplit(" ", 1) for line in lines if "latency_seconds_count" in line)
        name = 'vllm:e2e_request_latency_seconds_count{{model_name="{}"}}'
        assert [counts[name.format(each)] for each in ("tiny", "second")] == ["1.0", "2.0"]


class TestErrors:
    @pytest.mark.parametrize(
        ("path", "body", "status", "message"),
        [
            ("completions", OK | {"temperature": float("nan")}, 400, "NaN is no JSON number"),
            ("completions", OK | {"temperature": -1}, 400, "temperature is -1.0, not 0 or"),
            ("completions", OK | {"top_p": 2, "temperature": 0}, 400, "top_p is 2.0, not in (0"),
            ("completions", OK | {"temperature": "hot"}, 400, "temperature: Input should be a v"),
            ("completions", OK | {"best_of": 2}, 400, "best_of is served only where it is n"),
            ("completions", OK | {"a": None}, 400, "a: Extra inputs are not permitted"),
            ("completions", OK | {"prompt": 5}, 400, "prompt: not a string, a list of strings,"),
            ("completions", OK | {"prompt": ["a", [1]]}, 400, "prompt: not a string, a list of"),
            ("completions", OK | {"stop": ["a"] * 17}, 400, "stop: not a string of at most 1000"),
            ("completions", OK | {"stop": "a" * 1001}, 400, "stop: not a string of at most 1000"),
            ("completions", OK | {"\ud800": 1}, 400, "the body: Input should be a valid"),
            *(
                ("completions", OK | {"structured_outputs": grammar}, 400, "grammar is invalid")
                for grammar in ({"regex": "\ud800"}, {"grammar": 'start: "\ud800"'})
            ),
            ("completions", OK | {"prompt": ["a"] * 257}, 400, "257 prompts, and the server queue"),
            ("completions", OK | {"n": 1000}, 400, "n: Input should be less than or equal to 12"),
            ("completions", OK | {"max_tokens": 51}, 400, "max_tokens is 51: the server allows 50"),
            ("completions", OK | {"prompt": []}, 400, "there are no prompts"),
            ("completions", OK | {"prompt": "a" * 60}, 400, "61 tokens do not fit the model's"),
            ("completions", OK | {"prompt": [[999]]}, 400, "token 999 is outside the vocabulary"),
            ("completions", OK | {"prompt": "\ud800"}, 400, "is not valid Unicode"),
            ("completions", OK | {"logprobs": 21}, 400, "21 likeliest tokens are asked for"),
            ("completions", OK | {"max_tokens": 0}, 400, "max_tokens is 0, which needs echo"),
            ("completions", OK | {"max_tokens": -1, "echo": True}, 400, "max_tokens: Input should"),
            ("completions", OK | {"logit_bias": {"x": 1}}, 400, "'x' is not a token id"),
            ("completions", OK | {"logit_bias": {"999": 1}}, 400, "outside the vocabulary"),
            ("completions", OK | {"logit_bias": {"01": 1}}, 400, "'01' is not a token id"),
            ("completions", OK | {"logit_bias": {"9" * 5000: 1}}, 400, "999' is not a token id"),
            ("completions", OK | {"stop": ""}, 400, "not a list of non-empty strings"),
            ("completions", OK | {"stop": ["x<s>"]}, 400, "combines the special token <s>"),
            ("completions", OK | {"model": "big"}, 404, "there is no model 'big', only 'tiny'"),
            ("completions", OK | {"stream_options": {}}, 400, "stream_options needs stream"),
            ("completions", b"{", 400, "the body is not JSON"),
            ("completions", b"[" * 19_000, 400, "the body is not JSON: "),
            ("completions", b"[1]", 400, "the body is not a JSON object"),
            ("completions", b"\xff", 400, "the body is not JSON"),
            ("completions", b'{"model": "' + b"a" * 30_000, 413, "more than 20000 bytes"),
            *(
                ("chat/completions", HI | {name: value}, 400, f"{name}: not served")
                for name, value in {
                    "reasoning_effort": "low",
                    "audio": {"voice": "x"},
                    "functions": [],
                }.items()
            ),
            ("completions", OK | {"suffix": "b"}, 400, "suffix: 'b' is not served, only ''"),
            ("chat/completions", HI | {"store": True}, 400, "store: not served"),
            ("chat/completions", HI | {"tool_choice": {}}, 400, "tool_choice.type: Field requ"),
            ("chat/completions", HI | {"messages": []}, 400, "messages: List should have at least"),
            ("chat/completions", HI | {"messages": [{"role": "x"}]}, 400, "role: 'x' is not serve"),
            ("chat/completions", HI | {"messages": [{"role": "user"}]}, 400, "there is no content"),
            (
                "chat/completions",
                HI | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                400,
                "messages.0.content.0.type: 'image_url' is not served, only 'text'",
            ),
            (
                "chat/completions",
                HI | {"messages": [{"role": "user", "content": "a" * 70}]},
                400,
                "leaves no room for an answer in the context of 64",
            ),
            ("chat/completions", HI | {"top_logprobs": 1}, 400, "top_logprobs needs logprobs"),
            ("chat/completions", HI | {"tool_choice": "required"}, 400, "there are no tools"),
            (
                "chat/completions",
                HI
                | {
                    "tools": TOOLS,
                    "tool_choice": {"type": "function", "function": {"name": "h"}},
                },
                400,
                "there is no tool 'h'",
            ),
            ("chat/completions", HI | {"tools": TOOLS * 2}, 400, "have one name"),
        ],
        ids=lambda value: None if isinstance(value, int | dict | bytes) else value[:30],
    )
    def test_what_is_refused(self, server, path, body, status, message):
        """In OpenAI's form, without a traceback, and without a token sampled."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        response = httpx.post(
            f"{server[0]}/v1/{path}", content=body, headers={"authorization": "Bearer other"}
        )
        error = response.json()["error"]
        assert response.status_code == status, error
        assert message in error["message"]
        assert error["type"] == "invalid_request_error"
        assert "Traceback" not in response.text

    @pytest.mark.parametrize(
        ("kind", "body"),
        [
            (CompletionRequest, {"prompt": [0.5] * MANY}),
            (CompletionRequest, {"prompt": [[0.5]] * MANY}),
            (CompletionRequest, {"prompt": [[0.5] * MANY]}),
            (CompletionRequest, {"stop_token_ids": ["x"] * MANY}),
            (CompletionRequest, {"logit_bias": UNKNOWN}),
            (CompletionRequest, UNKNOWN),
            (ChatRequest, {"messages": [0] * MANY}),
            (ChatRequest, {"messages": [{"role": "user", "content": [0] * MANY}]}),
            (ChatRequest, {"messages": [{"role": "user", "content": "a", **UNKNOWN}]}),
            (ChatRequest, {"tools": [0] * MANY}),
            (ChatRequest, {"metadata": UNKNOWN}),
        ],
    )
    def test_few_errors_are_collected(self, kind, body):
        """However many a body has: that takes time, in which no stream is served."""
        valid = OK if kind is CompletionRequest else HI
        with pytest.raises(ApiError) as error:
            parse(kind, json.dumps(valid | body).encode())
        assert error.value.__cause__.error_count() < 10

    def test_they_are_looked_for_beside_the_loop(self, client, monkeypatch):
        """Which serves all streams, and whose pause would be as long as a body is large."""
        loops = []

        def parse_here(*arguments):
            loops.append(asyncio._get_running_loop())
            return parse(*arguments)

        monkeypatch.setattr("hymba_jax.serving.app.parse", parse_here)
        client.completions.create(**OK, max_tokens=1)
        assert loops == [None]

    def test_deeply_nested(self, server):
        value = {}
        for _ in range(70):
            value = {"a": value}
        tools = [{"type": "function", "function": {"name": "f", "parameters": value}}]
        response = httpx.post(
            f"{server[0]}/v1/chat/completions",
            json=HI | {"tools": tools},
            headers={"authorization": "Bearer other"},
        )
        assert response.status_code == 400
        assert "nested more than 64 levels" in response.json()["error"]["message"]

    @pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
    def test_keys(self, server, headers):
        for path in ("models", "models/tiny", "completions", "chat/completions"):
            method = "GET" if "models" in path else "POST"
            response = httpx.request(method, f"{server[0]}/v1/{path}", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"

    def test_unknown_places_and_methods(self, server):
        for method, path, status in [("GET", "/v2", 404), ("GET", "/v1/completions", 405)]:
            response = httpx.request(method, f"{server[0]}{path}")
            assert response.status_code == status
            assert response.json()["error"]["message"].startswith(f"GET {path}: ")

    def test_a_full_queue(self, client, server, monkeypatch):
        monkeypatch.setattr(server[1].scheduler, "max_waiting", 0)
        with pytest.raises(openai.RateLimitError, match="requests are waiting already"):
            client.completions.create(**OK)

    def test_an_error_while_it_runs(self, client, server, monkeypatch):
        """The model's own, and a deadline; in one piece and in a stream."""
        clock = server[1].scheduler.clock
        step = Scheduler.step

        def late(self):
            self.clock = lambda: clock() + 100
            step(self)

        monkeypatch.setattr(Scheduler, "step", late)
        with pytest.raises(openai.APIStatusError, match="not complete in 60 seconds") as error:
            client.completions.create(**OK)
        assert error.value.status_code == 504
        server[1].scheduler.clock = clock
        with pytest.raises(openai.APIError, match="not complete in 60 seconds"):
            list(client.completions.create(**OK, stream=True))
        server[1].scheduler.clock = clock

    def test_an_error_of_our_own(self, client, server, monkeypatch):
        """Says nothing of what happened here."""
        monkeypatch.setattr("hymba_jax.serving.served_model.logit_bias", lambda asked: 1 / 0)
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(**OK)
        assert error.value.body["message"] == "internal error"


def test_health_and_metrics(client, server):
    before = server[1].scheduler.num_completed
    client.completions.create(**OK, max_tokens=5, logit_bias=bias_for("B"))
    assert httpx.get(f"{server[0]}/health").status_code == 200
    assert httpx.get(f"{server[0]}/ready").status_code == 200
    lines = httpx.get(f"{server[0]}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['vllm:num_requests_running{model_name="tiny"}']) == 0
    assert float(values['vllm:generation_tokens_total{model_name="tiny"}']) >= 5
    assert float(values['vllm:prefix_cache_queries_total{model_name="tiny"}']) == 0
    assert float(values['vllm:time_to_first_token_seconds_count{model_name="tiny"}']) >= 1
    assert server[1].scheduler.num_completed == before + 1


def test_every_series_is_there_before_the_first_request():
    """Else a rate over it would miss the first ones."""
    lines = Metrics({"tiny": Scheduler(model(), slots=1)}).text().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    names = ["prompt_tokens_total", "generation_tokens_total", "inter_token_latency_seconds_count"]
    names += ["time_to_first_token_seconds_count", "e2e_request_latency_seconds_sum"]
    series = [f'vllm:{name}{{model_name="tiny"}}' for name in names]
    series += [
        f'vllm:request_success_total{{finished_reason="{reason}",model_name="tiny"}}'
        for reason in ("stop", "length")
    ]
    assert [float(values[each]) for each in series] == [0] * len(series)


def test_the_page(server):
    """It comes without a key, and loads nothing from elsewhere (driven in test_chat_page.py)."""
    response = httpx.get(server[0])
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"(src|href)=|https?:|innerHTML", response.text)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(server, stream):
    scheduler, before = server[1].scheduler, server[1].scheduler.num_completed
    # So slow that it cannot be complete before the client has left.
    scheduler.model.engine.decode = _slowly(scheduler.model.engine.decode)
    try:
        with httpx.Client(headers={"authorization": "Bearer secret"}) as client:
            # Nor does it end by itself.
            body = OK | {"max_tokens": 50, "stream": stream, "logit_bias": bias_for("B")}
            if stream:
                with client.stream("POST", f"{server[0]}/v1/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{server[0]}/v1/completions", json=body, timeout=0.2)
        wait_until(lambda: not scheduler.has_work)
    finally:
        del scheduler.model.engine.decode
    assert scheduler.num_completed == before


def _slowly(decode):
    wait = threading.Event()

    def slow(*args):
        wait.wait(0.05)
        return decode(*args)

    return slow


def random_request(rng):
    """The body of a request, for how many of its lines a client stays, and whether it is valid."""
    body = {
        "model": "tiny",
        "prompt": "".join(rng.choices("abc de\n", k=rng.randrange(0, 40))),
        "max_tokens": rng.randrange(1, 20),
        "temperature": rng.choice([0, 0, 0.7, 1.5]),
        "seed": rng.randrange(5),
        "n": rng.choice([1, 1, 1, 3]),
        "stream": rng.random() < 0.7,
    }
    if rng.random() < 0.2:
        body |= rng.choice([{"top_p": 0.9}, {"presence_penalty": 1.0}, {"logprobs": 2}])
    if rng.random() < 0.1:
        wrong = [{"temperature": -1}, {"top_p": 7}, {"prompt": "a" * 99}, {"x": 1}, {"n": 0}]
        return body | rng.choice(wrong), None, False
    return body, rng.randrange(1, 6) if rng.random() < 0.2 else None, True


def ask_at_random(url, seeds, answers):
    """Sends the requests of these seeds; those that stay to the end compare what they got."""
    with httpx.Client(headers={"authorization": "Bearer secret"}, timeout=120) as client:
        for seed in seeds:
            body, stays, is_valid = random_request(random.Random(seed))
            with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                assert response.status_code == (200 if is_valid else 400)
                if stays is not None:
                    for _, _ in zip(range(stays), response.iter_lines(), strict=False):
                        pass
                    continue
                text = "".join(response.iter_text())
            if is_valid:
                key = json.dumps(body | {"stream": None}, sort_keys=True)
                got = _texts(text, stream=body["stream"])
                assert answers.setdefault(key, got) == got


def _texts(text, *, stream):
    texts = {}
    events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    for event in events if stream else [text]:
        for choice in json.loads(event)["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


def check_answers(answers, count):
    """Some of them, against `generate`, by their first samples."""
    for key in sorted(answers)[:count]:
        body = json.loads(key)
        names = ("temperature", "seed", "presence_penalty", "top_p")
        options = {name: body[name] for name in names if name in body}
        if not body["temperature"]:
            options.pop("top_p", None)
        (wanted,) = expected(body["prompt"], body["max_tokens"], **options)
        assert answers[key][0] == wanted.text


def test_random_requests_and_disconnects(server):
    answers, url = {}, server[0]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ask_at_random(url, range(i, 80, 8), answers), range(8)))
    check_answers(answers, 6)


@pytest.mark.slow
def test_ten_thousand_random_requests(server):
    """Memory does not grow: Python's own after the first thousand is that after the last."""
    answers, url, sizes = {}, server[0], []
    tracemalloc.start()
    try:
        for start in range(0, 10_000, 1000):
            seeds = [range(start + i, start + 1000, 16) for i in range(16)]
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda which: ask_at_random(url, which, {}), seeds))
            wait_until(lambda: not server[1].scheduler.has_work)
            server[1].asked.clear()
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[-1] < sizes[0] + 2e6  # a leak of a kilobyte per request would be 9 MB
    ask_at_random(url, range(200), answers)
    check_answers(answers, 50)


class TestBench:
    """`hymba bench-serve`, against the same server."""

    def test_a_report(self, server, tmp_path, capsys):
        before = server[1].scheduler.num_completed
        bench.main(
            BenchConfig(
                f"{server[0]}/v1/",
                api_key="secret",
                requests=9,
                rate=200.0,
                clients=3,
                prompt_words=(1, 4),
                max_tokens=(2, 12),
                output=str(tmp_path / "report.json"),
            )
        )
        report = json.loads((tmp_path / "report.json").read_text())
        assert (report["requests"], report["completed"], report["errors"]) == (9, 9, {})
        assert server[1].scheduler.num_completed == before + 9
        assert capsys.readouterr().out.startswith("9 of 9 requests in ")
        for values in report["ms"].values():
            assert values["p50"] <= values["p90"] <= values["p99"] <= values["max"]

    def test_a_trace_with_errors(self, server, tmp_path):
        """The one that is refused is counted apart."""
        lines = [{"prompt": "a\u2028b", "max_tokens": n, "id": n} for n in (3, 4, 999)]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (tmp_path / "trace.jsonl").write_text(text)
        config = BenchConfig(
            f"{server[0]}/v1", "tiny", "secret", trace=str(tmp_path / "trace.jsonl")
        )
        report = bench.summarize(asyncio.run(bench.measure(config)))
        assert (report["requests"], report["completed"]) == (3, 2)
        ((error, count),) = report["errors"].items()
        assert count == 1
        assert error.startswith('status 400: {"error":')

    def test_what_is_measured(self):
        """Of two answers: by hand."""
        answers = [
            Measured(10.0, [10.5, 10.6, 10.9], 11.0, 7, 5),
            Measured(12.0, [12.1], 12.1, 3, 1),
            Measured(11.0, error="no"),
        ]
        report = bench.summarize(answers)
        assert report["seconds"] == pytest.approx(2.1)
        assert report["completion_tokens_per_second"] == pytest.approx(6 / 2.1)
        assert report["prompt_tokens_per_second"] == pytest.approx(10 / 2.1)
        means = {name: values["mean"] for name, values in report["ms"].items()}
        assert means == pytest.approx({"TTFT": 300, "ITL": 200, "TPOT": 100, "latency": 550})

    @staticmethod
    def ask(events):
        """What is measured of an endpoint that answers with these."""
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        transport = httpx.MockTransport(lambda request: httpx.Response(200, text=text))

        async def ask():
            async with httpx.AsyncClient(transport=transport) as client:
                return await bench._ask(client, "http://other/v1", {}, 0.0)

        return asyncio.run(ask())

    def test_an_endpoint_that_says_more(self):
        """An error that is null, and usage before the last event."""
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        events = [
            {"error": None, "choices": [{"text": "a"}], "usage": usage},
            {"choices": [], "usage": None},
        ]
        answer = self.ask(events)
        assert (answer.error, answer.prompt_tokens, answer.completion_tokens) == ("", 3, 2)
        assert len(answer.times) == 1

    @pytest.mark.parametrize("event", [[], 5, {"choices": [5]}, {"usage": {"prompt_tokens": 3}}])
    def test_an_endpoint_that_says_something_else(self, event):
        answer = self.ask([{"choices": [{"text": "a"}]}, event])
        assert answer.error.startswith("an event is not as OpenAI's API has it: ")

    def test_answers_without_usage_or_in_one_delta(self, monkeypatch, capsys):
        """Their time for a token is unknown."""

        async def measure(config):
            return [Measured(10.0, [10.5, 10.6], 11.0), Measured(10.0, [10.5], 11.0, 3, 4)]

        monkeypatch.setattr(bench, "measure", measure)
        bench.main(BenchConfig("http://other/v1"))
        shown = capsys.readouterr().out
        assert "1 x no usage: those answers' tokens are not counted" in shown
        assert "ITL" in shown
        assert "TPOT " not in shown

    @pytest.mark.parametrize("rate", [0.0, 1e6])
    def test_with_a_rate_time_until_a_client_is_free_counts(self, monkeypatch, rate):
        async def answer(request):
            await asyncio.sleep(0.05)
            return httpx.Response(200, text="data: [DONE]\n\n")

        client = functools.partial(httpx.AsyncClient, transport=httpx.MockTransport(answer))
        monkeypatch.setattr(httpx, "AsyncClient", client)
        config = BenchConfig("http://other/v1", "m", requests=3, rate=rate, clients=1)
        first, _, third = asyncio.run(bench.measure(config))
        assert (third.sent < first.ended) == (rate > 0)

    def test_a_trace_without_requests(self, tmp_path):
        (tmp_path / "trace.jsonl").write_text("\n\n")
        with pytest.raises(HymbaError, match=r"trace\.jsonl: there are no requests in it"):
            bench.main(BenchConfig("http://host/v1", "m", trace=str(tmp_path / "trace.jsonl")))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"url": "http://127.0.0.1:9/v1"}, "http://127.0.0.1:9/v1/models: no model: "),
            ({"api_key": "wrong"}, "no model: status 401: give the server's api_key"),
            ({"path": ""}, "no model: status 404: the URL has to end in /v1"),
            ({"model": "big"}, "no request was answered: status 404: "),
            ({"clients": 0}, "requests and clients are at least 1"),
            ({"max_tokens": (3, 2)}, "max_tokens is 3 2, not from 1 up"),
            ({"trace": __file__}, 'line 1: not an object with "prompt" and "max_tokens"'),
            ({"url": "http://host:port/v1", "model": "tiny"}, "no request was answered: Invalid p"),
            ({"output": "gone/report.json"}, "gone/report.json: there is no directory"),
        ],
    )
    def test_what_cannot_be_measured(self, server, changes, message):
        url = server[0] + changes.get("path", "/v1")
        options = {"url": url, "api_key": "secret", "requests": 2} | changes
        options.pop("path", None)
        with pytest.raises(HymbaError) as error:
            bench.main(BenchConfig(**options))
        assert message in str(error.value)
