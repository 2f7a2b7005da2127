"""A conversation, with a model that says what it is told to."""

import dataclasses
import io
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import tyro

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference import chat
from hymba_jax.inference.chat import ChatConfig
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.tokenizer import Tokenizer, build_tokenizer

CHOICE = ModelChoice("runs/it")

TEMPLATE = (
    "{% for m in messages %}"
    "{% if 'forbidden' in m.content %}{{ raise_exception('no such words') }}{% endif %}"
    "[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]"
)


class Delta(NamedTuple):
    text: str


class Model(LanguageModel):
    """Says the answers, delta by delta; an exception among the deltas is raised."""

    def __init__(self, *answers, template=TEMPLATE, context=1000):
        model = build_tokenizer("bytes", []).model
        self.tokenizer = Tokenizer(model, "<s>", "</s>", template)
        self.engine = SimpleNamespace(max_context=context)
        self.answers = iter(answers)
        self.asked = []
        self.sampling = []

    def stream(self, prompts, config):
        (prompt,) = prompts
        self.asked.append(self.tokenizer.decode(prompt))
        self.sampling.append(config)
        for delta in next(self.answers):
            if not isinstance(delta, str):
                raise delta
            yield Delta(delta)


@pytest.fixture
def say(monkeypatch, capsys):
    """Holds the conversation whose messages are the lines of a text; returns what it printed."""

    def say(model, text, **config):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        chat.run(model, ChatConfig(CHOICE, **{"sampling": SamplingConfig(), **config}))
        return capsys.readouterr()

    return say


def test_a_conversation(say):
    model = Model(["He", "llo"], ["Fine"])
    printed = say(model, "Hi\n\n  How are you? \n", system="Be brief.")
    assert printed.out == "Hello\nFine\n"
    assert printed.err.splitlines() == [
        "runs/it: /exit or Ctrl-D leaves, Ctrl-C stops an answer, /help for more"
    ]
    assert model.asked == [
        "[s]Be brief.[u]Hi[a]",
        "[s]Be brief.[u]Hi[a]Hello[u]How are you?[a]",
    ]


def test_sampling_is_passed_on_with_a_seed_for_each_answer(say):
    model = Model("a", "b", "c")
    sampling = SamplingConfig(temperature=0.5, seed=2**32 - 2, stop=("#",), stop_tokens=(7,))
    say(model, "1\n2\n3\n", sampling=sampling)
    passed_on = dataclasses.replace(sampling, stop=("#", "</s>", "[u]"))
    assert model.sampling == [
        dataclasses.replace(passed_on, seed=seed) for seed in (2**32 - 2, 2**32 - 1, 0)
    ]


def test_commands(say):
    model = Model("a", "b", "c")
    printed = say(model, "1\n/help\n/reset\n2\n/other\n/exit\n3\n")
    assert model.asked == ["[u]1[a]", "[u]2[a]", "[u]2[a]b[u]/other[a]"]
    assert printed.out == "a\nb\nc\n"
    assert chat.HELP in printed.err.splitlines()


def test_an_interrupted_answer_stays(say):
    model = Model(["One, ", "two", KeyboardInterrupt()], ["b"])
    assert say(model, "Count\nGo on\n").out == "One, two\nb\n"
    assert model.asked[1] == "[u]Count[a]One, two[u]Go on[a]"


def test_an_error_in_a_turn_is_one_line_and_forgotten(say):
    model = Model("a", [HymbaError("no room")], "c")
    printed = say(model, "1\nforbidden\n2\n3\n")
    assert printed.err.splitlines()[1:] == [
        "error: the chat template failed: no such words",
        "error: no room",
    ]
    assert printed.out == "a\nc\n"
    assert model.asked[-1] == "[u]1[a]a[u]3[a]"


FORGOTTEN = "(the oldest messages no longer fit the context and were dropped)"


def test_the_oldest_exchanges_are_forgotten_when_there_is_no_room(say):
    """A context of 31: 10 for the answer, and [s], [u] and [a] are 3 each."""
    model = Model("a", "b", "c", "d", context=31)
    lines = ["11", "22", "3", 11 * "4"]
    sampling = SamplingConfig(max_new_tokens=10)
    printed = say(model, "\n".join(lines), system="S", sampling=sampling)
    assert model.asked == [
        "[s]S[u]11[a]",
        "[s]S[u]11[a]a[u]22[a]",
        "[s]S[u]3[a]",
        "[s]S[u]44444444444[a]",
    ]
    assert printed.err.splitlines()[1:] == [FORGOTTEN, FORGOTTEN]


def test_the_turns_after_that_forget_nothing(say):
    """Of prompts of up to 40 tokens: half of the history's room is kept, and the next ones begin as
    those before."""
    model = Model(*"abcdefghij", context=60)
    printed = say(model, "\n".join("0123456789"), sampling=SamplingConfig(max_new_tokens=20))
    lengths = [7, 15, 23, 31, 39, 23, 31, 39, 23, 31]
    assert [len(asked) for asked in model.asked] == lengths
    assert model.asked[5] == "[u]3[a]d[u]4[a]e[u]5[a]"
    for before, after in itertools.pairwise(model.asked[5:8]):
        assert after.startswith(before)
    assert printed.err.splitlines()[1:] == [FORGOTTEN, FORGOTTEN]


def test_a_long_message_leaves_less_room_and_one_too_long_none(say):
    """All of the context could be wanted for an answer."""
    model = Model("a", "b", "c", context=39)
    printed = say(model, f"1\n2\n{33 * 'x'}\n{32 * 'x'}\n")
    assert model.asked == ["[u]1[a]", "[u]1[a]a[u]2[a]", f"[u]{32 * 'x'}[a]"]
    assert printed.err.splitlines()[1:] == [
        "error: the message is too long: a prompt of 39 tokens leaves no room for "
        "an answer in the model's context of 39",
        FORGOTTEN,
    ]


def test_a_message_that_is_too_long_leaves_the_conversation_alone(say):
    model = Model("a", "b", context=39)
    say(model, "1\n" + 60 * "x" + "\n2\n")
    assert model.asked[1] == "[u]1[a]a[u]2[a]"


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no chat template: give prompts of text"), ("{% if %}", "the chat template failed")],
)
def test_no_conversation_without_a_template(say, template, message):
    with pytest.raises(HymbaError, match=message):
        say(Model(template=template), "Hi\n")


def test_help_lists_what_has_an_effect(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(ChatConfig, args=["--help"])
    printed = "".join(capsys.readouterr())
    options = set(re.findall(r"--[a-z-]+", printed))
    assert {"--model", "--system", "--temperature", "--max-new-tokens", "--stop"} <= options
    assert not {"--num-samples", "--batch-size"} & options
    config = tyro.cli(ChatConfig, args=["--model", "m", "--seed", "3", "--context", "9"])
    assert config == ChatConfig(ModelChoice("m", context=9), SamplingConfig(seed=3))


def test_a_conversation_has_one_answer():
    with pytest.raises(HymbaError, match="num_samples is 2: a conversation has one answer"):
        ChatConfig(CHOICE, sampling=SamplingConfig(num_samples=2, temperature=1.0))


def test_input_that_is_no_text(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(HymbaError, match="the input is not valid UTF-8"):
        chat.run(Model(), ChatConfig(CHOICE, SamplingConfig()))


def test_on_a_terminal():
    """Ctrl-C stops an answer, and at the prompt it leaves."""
    script = """
        import time
        from test_chat import CHOICE, ChatConfig, Model, Delta, SamplingConfig, chat

        class Slow(Model):
            def stream(self, prompts, config):
                yield Delta("one")
                time.sleep(60)

        chat.run(Slow(), ChatConfig(CHOICE, SamplingConfig()))
        print("left")
    """
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=os.path.dirname(__file__),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    deadline = threading.Timer(60, process.kill)
    deadline.start()
    seen = ""

    def read_until(text):
        nonlocal seen
        while text not in seen:
            seen += os.read(screen, 1000).decode()
        before, _, seen = seen.partition(text)
        return before

    try:
        assert read_until("> ").startswith("runs/it: /exit or Ctrl-D leaves")
        os.write(screen, b"Count\n")
        read_until("one")
        process.send_signal(signal.SIGINT)
        read_until("> ")
        time.sleep(0.5)  # the prompt is written shortly before the reading begins
        process.send_signal(signal.SIGINT)
        read_until("left")
        assert process.wait(30) == 0
    finally:
        deadline.cancel()
        process.kill()
        process.wait()
        os.close(screen)
