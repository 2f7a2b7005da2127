"""`hymba generate` as its users meet it."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from entry.command import HYMBA, environment, run
from inference.models import byte_tokenizer, make_model

import hymba_jax
from hymba_jax import cli
from hymba_jax.errors import HymbaError
from hymba_jax.inference import LanguageModel, SamplingConfig
from hymba_jax.inference.saving import save_model

PROMPTS = ["the old", "Who sat?", "é€"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model alone."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, make_model(), byte_tokenizer())
    return path


@pytest.fixture(scope="module")
def model(directory):
    return hymba_jax.load(directory)


@pytest.fixture
def generate(directory, monkeypatch, capsys):
    """Runs the command in this process and returns what it printed."""
    monkeypatch.setattr("hymba_jax.inference.warmup.use_compilation_cache", lambda: None)

    def generate(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        arguments = ("--model", directory, "--max-new-tokens", 9, *arguments)
        cli.main(["generate", *map(str, arguments)])
        return capsys.readouterr()

    return generate


@pytest.fixture
def refusal(generate):
    """Runs the command and returns the one line that it stops with."""

    def refusal(*arguments, **stdin):
        with pytest.raises(SystemExit) as stopped:
            generate(*arguments, **stdin)
        message = stopped.value.code  # a text is printed, and exits with status 1
        assert isinstance(message, str)
        assert "\n" not in message
        return message

    return refusal


def continued(model, prompts, **sampling):
    """What the command should print."""
    completions = model.generate(prompts, **{"max_new_tokens": 9, **sampling})
    return "".join(f"{prompts[c.index]}{c.text}\n" for c in completions)


def test_one_prompt_in_a_process_of_its_own(directory, model, cache):
    command = [HYMBA, "generate", "--model", directory, "--prompt", PROMPTS[0]]
    result = run([*command, "--max-new-tokens", "9"], cache)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == continued(model, PROMPTS[:1])


def test_one_prompt_is_continued_as_it_comes(generate, model, monkeypatch):
    written = []

    class Terminal(io.StringIO):
        def flush(self):
            written.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    generate("--prompt", PROMPTS[0])
    assert written[0] == PROMPTS[0]
    assert len(set(written)) > 5
    assert sys.stdout.getvalue() == continued(model, PROMPTS[:1])


def test_without_prompts_a_text_is_begun(generate, model):
    assert generate().out == continued(model, [""])


def test_many_prompts_are_printed_when_they_are_done(generate, model):
    assert generate("--prompt", *PROMPTS).out == continued(model, PROMPTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("some.txt", "\n".join(PROMPTS)),
        ("odd.txt", "\r\n\r\n".join(PROMPTS) + "\r\n \r\n"),
        (
            "some.jsonl",
            "\n\n".join(json.dumps({"id": 3, "prompt": prompt}) for prompt in PROMPTS) + "\n",
        ),
    ],
)
def test_prompts_from_a_file(generate, model, tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert generate("--file", tmp_path / name).out == continued(model, PROMPTS)


def test_prompts_from_standard_input_come_after_the_others(generate, model):
    lines = "\n".join(PROMPTS[1:]).encode()
    printed = generate("--prompt", PROMPTS[0], "--file", "-", stdin=lines)
    assert printed.out == continued(model, PROMPTS)


def test_sampling_flags(generate, model):
    arguments = ("--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01)
    more = ("--repetition-penalty", 1.2, "--num-samples", 2, "--seed", 4, "--max-new-tokens", 12)
    stops = ("--stop", "a", "b", "--stop-tokens", 5, 6)
    sampling = SamplingConfig(
        max_new_tokens=12,
        temperature=0.9,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        num_samples=2,
        seed=4,
        stop=("a", "b"),
        stop_tokens=(5, 6),
    )
    printed = generate("--prompt", *PROMPTS, *arguments, *more, *stops)
    assert printed.out == continued(model, PROMPTS, **vars(sampling))


def test_json_lines(generate, model, tmp_path):
    output = tmp_path / "out.jsonl"
    asked = ("--prompt", *PROMPTS, "--format", "json", "--num-samples", 2, "--temperature", 1)
    generate(*asked, "--output", output)
    assert generate(*asked).out == output.read_text()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    completions = model.generate(PROMPTS, max_new_tokens=9, num_samples=2, temperature=1.0)
    assert lines == [{"prompt": PROMPTS[c.index], **vars(c)} for c in completions]
    keys = {"prompt", "index", "sample", "text", "tokens", "log_probs", "finish_reason"}
    assert all(set(line) == keys for line in lines)


def test_one_prompt_to_a_file(generate, model, tmp_path):
    (tmp_path / "out.txt").write_text("old")
    printed = generate("--prompt", PROMPTS[0], "--output", tmp_path / "out.txt")
    assert printed == ("", "")
    assert (tmp_path / "out.txt").read_text() == continued(model, PROMPTS[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_progress_is_shown_on_standard_error_alone(generate, model, monkeypatch):
    assert generate("--prompt", *PROMPTS).err == ""  # no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    printed = generate("--prompt", *PROMPTS)
    assert "generating" in printed.err
    assert printed.out == continued(model, PROMPTS)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HymbaError("it broke"), "error: it broke"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_output_is_written_whole_or_not_at_all(generate, monkeypatch, tmp_path, error, status):
    stream = LanguageModel.stream

    def fail(self, *args, **kwargs):
        yield next(stream(self, *args, **kwargs))
        raise error

    monkeypatch.setattr(LanguageModel, "stream", fail)
    with pytest.raises(SystemExit) as stopped:
        generate("--prompt", *PROMPTS, "--output", tmp_path / "out.txt")
    assert stopped.value.code == status
    assert not list(tmp_path.iterdir())


def test_interrupting_it(directory, tmp_path, cache):
    """While it waits for prompts, which tells when the signal can be sent."""
    os.mkfifo(tmp_path / "prompts")
    output = ["--output", tmp_path / "out.txt"]
    process = subprocess.Popen(
        [HYMBA, "generate", "--model", directory, "--file", tmp_path / "prompts", *output],
        env=environment(cache),
        stderr=subprocess.PIPE,
        text=True,
    )
    with open(tmp_path / "prompts", "w"):  # goes on when the other side is opened
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "{path}: No such file or directory"),
        ("empty.txt", b"", "{path}: there are no prompts in it"),
        ("blank.txt", b"\n \n\t\n", "{path}: there are no prompts in it"),
        ("binary.txt", b"one\n\xff\xfe\n", "{path}: no text: it has bytes that are not UTF-8"),
        ("broken.jsonl", b'{"prompt": "a"}\n\n{"prompt"\n', "{path}, line 3: broken JSON (Expect"),
        ("other.jsonl", b'{"text": "a"}\n', "{path}, line 1: no field 'prompt' that is a text"),
        ("list.jsonl", b'["a"]\n', "{path}, line 1: no field 'prompt' that is a text"),
        ("number.jsonl", b'{"prompt": 3}\n', "{path}, line 1: no field 'prompt' that is a text"),
    ],
)
def test_unusable_files(refusal, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert refusal("--file", path).startswith(f"error: {message.format(path=path)}")


def test_standard_input_that_is_no_text(refusal):
    assert refusal("--file", "-", stdin=b"a\xff\n").startswith("error: standard input: no text")
    assert refusal("--file", "-").startswith("error: standard input: there are no prompts in it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model"], "/no/such/model: no model is here, there is no config"),
        (["--step", "3"], "/checkpoints: no checkpoint 3; there is none"),
        (["--prompt", "x" * 600], "the prompt: 601 tokens, and the model's context is 512 with"),
        (["--prompt", "a", "x" * 600], "prompt 2: 601 tokens, and the model's context is 512"),
        (["--prompt", "\udcff"], "'\\udcff' is no text: it has bytes that are not UTF-8"),
        (["--temperature", "-1"], "sampling: temperature is -1.0, not 0 or between"),
        (["--num-samples", "0", "--top-p", "2"], "top_p is 2.0, not in (0, 1]; num_samples is 0"),
        (["--batch-size", "0"], "batch_size is 0, not at least 1"),
        (["--context", "513"], "a context of 513 tokens: the model's is 1 to 512"),
        (["--output", "/no/such/place/out.txt"], "there is no directory /no/such/place"),
        (["--output", "/"], "/: is a directory, name a file"),
    ],
)
def test_impossible_values(refusal, arguments, message):
    assert refusal(*arguments).startswith("error: ")
    assert message in refusal(*arguments)


def test_an_impossible_value_in_a_process_of_its_own(directory, cache):
    result = run([HYMBA, "generate", "--model", directory, "--max-new-tokens", "0"], cache)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: sampling: max_new_tokens is 0, not at least 1\n"
