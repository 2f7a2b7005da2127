"""`hymba generate` as its users meet it."""

import io
import json
import os
import signal
import stat
import subprocess
import sys
from itertools import chain

import pytest
from entry.command import HYMBA, environment, run
from inference.models import byte_tokenizer, make_model

import hymba_jax
from hymba_jax import cli
from hymba_jax.checkpoint.save import save_model
from hymba_jax.errors import HymbaError
from hymba_jax.inference import LanguageModel, SamplingConfig

PROMPTS = ["the old", "Who sat?", "é€"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A standalone model."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, make_model(layers="L"), byte_tokenizer())
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
        usual = {"--model": directory, "--max-new-tokens": 9}
        others = (pair for pair in usual.items() if pair[0] not in arguments)
        cli.main(["generate", *map(str, chain(*others, arguments))])
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
    texts = [f"{prompts[c.index]}{c.text}\n" for c in completions]
    if len(texts) == 1:
        return texts[0]
    heads = [f"--- prompt {c.index + 1}, sample {c.sample + 1} ---\n" for c in completions]
    return "".join(head + text for head, text in zip(heads, texts, strict=True))


def test_one_prompt_in_a_process_of_its_own(directory, model, tmp_path):
    """It finds all programs that `hymba warmup` has compiled in another one."""
    cache, options = tmp_path / "cache", ["--model", directory, "--context", "32"]

    def compiled():
        return {path.name for path in cache.iterdir() if not path.name.endswith("-atime")}

    result = run([HYMBA, "warmup", *options], cache)
    assert (result.returncode, result.stderr) == (0, "")
    warmed, kept = result.stdout.splitlines()
    assert warmed.startswith("1 x 1 tokens: ")
    assert kept == f"kept in {cache}"
    before = compiled()
    assert before
    command = [HYMBA, "generate", *options, "--prompt", PROMPTS[0], "--max-new-tokens", "9"]
    result = run(command, cache)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == continued(model, PROMPTS[:1])
    assert compiled() == before


def test_one_prompt_is_streamed(generate, model, monkeypatch):
    written = []

    class Terminal(io.StringIO):
        def flush(self):
            written.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    generate("--prompt", PROMPTS[0])
    assert written[0] == PROMPTS[0]
    assert len(set(written)) > 5
    assert sys.stdout.getvalue() == continued(model, PROMPTS[:1])


def test_without_prompts_one_is_empty(generate, model):
    assert generate().out == continued(model, [""])


def test_many_prompts_are_printed_when_they_are_done(generate, model):
    assert generate("--prompt", *PROMPTS).out == continued(model, PROMPTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("some.txt", "\n".join(PROMPTS)),
        ("odd.txt", "\r\n\r\n".join(PROMPTS) + "\r\n \r\n"),
        ("mark.txt", "\ufeff" + "\n".join(PROMPTS)),
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
    for mark in (b"", b"\xef\xbb\xbf"):
        printed = generate("--prompt", PROMPTS[0], "--file", "-", stdin=mark + lines)
        assert printed.out == continued(model, PROMPTS)


def test_values_that_look_like_options(generate, model):
    for prompt, arguments in [
        ("-x", ["--prompt", "-x"]),
        ("- a", ["--prompt", "- a"]),
        ("-x", ["--prompt=-x"]),
        ("--x", ["--prompt=--x"]),
        ("---", ["--prompt", "---"]),
    ]:
        assert generate(*arguments).out == continued(model, [prompt])
    printed = generate("--prompt", "-x", "a", "--stop", "-e", "--seed", "3")
    assert printed.out == continued(model, ["-x", "a"], stop=("-e",))


def test_escapes_in_stop_strings(generate, model):
    (free,) = model.generate("a", max_new_tokens=9)
    stop = next(character for character in free.text if character.isascii())
    for written in (stop, f"\\x{ord(stop):02x}", f"\\u{ord(stop):04x}"):
        written = "\\\\" if written == "\\" else written
        printed = generate("--prompt", "a", "--stop", r"\n\n", written).out
        assert printed == continued(model, ["a"], stop=("\n\n", stop))


def test_what_the_context_cuts_short_is_said_once_for_each_prompt(generate, model):
    asked = ("--context", 32, "--max-new-tokens", 20, "--temperature", 1, "--num-samples", 2)
    printed = generate("--prompt", "a" * 26, "b" * 5, "c" * 28, *asked)
    notes = printed.err.splitlines()
    assert notes == [
        f"note: prompt {i}: only {room} of 20 new tokens fit: the model's context is 32 tokens"
        for i, room in ((1, 5), (3, 3))
    ]
    line = "note: the prompt: only 4 of 9 new tokens fit: the model's context is 32 tokens\n"
    printed = generate("--prompt", "a" * 27, "--context", 32, "--format", "json")
    assert printed.err == line
    assert json.loads(printed.out)["context_full"] is True
    assert generate("--prompt", "a" * 27, "--context", 32, "--max-new-tokens", 4).err == ""


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
    assert all(set(line) == keys | {"context_full"} for line in lines)


def test_fields_of_json_prompts_are_passed_through(generate, tmp_path):
    extra = {"id": "7\ud800", "meta": {"é": [1, None]}}
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", **extra}) + "\n" + json.dumps({"prompt": "b"}))
    asked = ("--prompt", "c", "--file", path, "--format", "json", "--max-new-tokens", 2)
    generate(*asked, "--output", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["c", "a", "b"]
    assert {name: lines[1][name] for name in extra} == extra
    assert not any(name in line for line in (lines[0], lines[2]) for name in extra)


def test_a_field_of_a_json_prompt_that_the_output_has(generate, refusal, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "text": "b", "id": 1}\n')
    assert refusal("--file", path, "--format", "json") == (
        f"error: {path}, line 1: the output has a field 'text' of its own: rename the prompt's"
    )
    assert generate("--file", path).out.startswith("a")


def test_one_prompt_to_a_file(generate, model, tmp_path):
    (tmp_path / "out.txt").write_text("old")
    printed = generate("--prompt", PROMPTS[0], "--output", tmp_path / "out.txt")
    assert printed == ("", "")
    assert (tmp_path / "out.txt").read_text() == continued(model, PROMPTS[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_an_output_keeps_its_kind_and_mode(generate, model, tmp_path):
    expected = continued(model, PROMPTS[:1])
    asked = ("--prompt", PROMPTS[0], "--output")
    target, link, mine = (tmp_path / name for name in ("target", "link", "target.partial"))
    target.write_text("old")
    target.chmod(0o600)
    mine.write_text("mine")
    link.symlink_to("target")
    generate(*asked, link)
    assert link.is_symlink()
    assert target.read_text() == expected
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert mine.read_text() == "mine"
    generate(*asked, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    generate(*asked, tmp_path / "fifo")
    assert os.read(reader, 1000).decode() == expected
    os.close(reader)
    (tmp_path / "broken").symlink_to("later")
    generate(*asked, tmp_path / "broken")
    assert (tmp_path / "later").read_text() == expected
    names = ["broken", "fifo", "later", "link", "target", "target.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


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
    """While it waits for prompts, and says so, which tells when the signal can be sent."""
    program = """
import sys, time
from hymba_jax import cli
from hymba_jax.inference import generate

def wait():
    print("waiting", flush=True)
    time.sleep(120)

generate._standard_input = wait
cli.main(sys.argv[1:])
"""
    arguments = ["--model", directory, "--file", "-", "--output", tmp_path / "out.txt"]
    with subprocess.Popen(
        [sys.executable, "-c", program, "generate", *map(str, arguments)],
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "{path}: No such file or directory"),
        ("empty.txt", b"", "{path}: there are no prompts in it"),
        ("blank.txt", b"\n \n\t\n", "{path}: there are no prompts in it"),
        ("binary.txt", b"one\n\xff\xfe\n", "{path}: not UTF-8 text (byte 4)"),
        ("deep.jsonl", b"[" * 100_000, "{path}, line 1: broken JSON (nested too deeply)"),
        ("broken.jsonl", b'{"prompt": "a"}\n\n{"prompt"\n', "{path}, line 3: broken JSON (Expect"),
        ("other.jsonl", b'{"text": "a"}\n', "{path}, line 1: no field 'prompt' that is a string"),
        ("list.jsonl", b'["a"]\n', "{path}, line 1: no field 'prompt' that is a string"),
        ("number.jsonl", b'{"prompt": 3}\n', "{path}, line 1: no field 'prompt' that is a string"),
    ],
)
def test_unusable_files(refusal, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert refusal("--file", path).startswith(f"error: {message.format(path=path)}")


def test_prompts_are_not_replaced_by_their_completions(refusal, tmp_path):
    (tmp_path / "prompts.txt").write_text("a")
    names = str(tmp_path / "prompts.txt"), str(tmp_path / "." / "prompts.txt")
    assert "is the input, name another file" in refusal("--file", names[0], "--output", names[1])
    assert (tmp_path / "prompts.txt").read_text() == "a"


def test_files_that_may_never_end(refusal, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, kind in (("/dev/zero", "device"), (tmp_path / "fifo", "FIFO"), ("/", "directory")):
        message = f"error: {path}: is a {kind}, not a regular file"
        assert refusal("--file", path, "--output", tmp_path / "out.txt") == message
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


def test_standard_input_that_is_no_text(refusal):
    message = "error: standard input: not UTF-8 text (byte 1)"
    assert refusal("--file", "-", stdin=b"a\xff\n") == message
    assert refusal("--file", "-").startswith("error: standard input: there are no prompts in it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model"], "/no/such/model: no model found, there is no such d"),
        (["--step", "3"], "/checkpoints: no checkpoint 3; there is none"),
        (["--prompt", "x" * 600], "the prompt: 601 tokens do not fit the model's context of 512"),
        (
            ["--prompt", "a", "x" * 600],
            "prompt 2: 601 tokens do not fit the model's context of 512",
        ),
        (["--prompt", "\udcff"], "'\\udcff' is not valid Unicode: it has bytes that are not UTF-8"),
        (["--temperature", "-1"], "sampling: temperature is -1.0, not 0 or between"),
        (["--num-samples", "0", "--top-p", "2"], "top_p is 2.0, not in (0, 1]; num_samples is 0"),
        (["--top-p", "0.9"], "top_p 0.9 has no effect at temperature 0"),
        (["--num-samples", str(10**10)], f"num_samples is {10**10}, not between 1 and 1048576"),
        (["--max-new-tokens", str(10**12)], f"max_new_tokens is {10**12}, not between 1 and"),
        (["--context", str(10**12)], f"a context of {10**12} tokens: the model's is 1 to 512"),
        (["--stop", r"\d"], r"stop '\\d': \d is not an escape; valid are \n, \r, \t"),
        (
            ["--prompt", "a", "b", "--speculate"],
            "speculate has no effect on 2 completions at the same time: leave it out, or set batch",
        ),
        (["--batch-size", "0"], "batch_size is 0, not at least 1"),
        (["--context", "513"], "a context of 513 tokens: the model's is 1 to 512"),
        (["--output", "/no/such/place/out.txt"], "there is no directory /no/such/place"),
        (["--output", "/"], "/: is a directory, name a file"),
    ],
)
def test_impossible_values(refusal, arguments, message):
    assert refusal(*arguments).startswith("error: ")
    assert message in refusal(*arguments)


@pytest.mark.slow  # as of `train.py` in test_bad_input.py
def test_an_impossible_value_in_a_process_of_its_own(directory, cache):
    result = run([HYMBA, "generate", "--model", directory, "--max-new-tokens", "0"], cache)
    assert (result.returncode, result.stdout) == (1, "")
    expected = "error: sampling: max_new_tokens is 0, not between 1 and 2147483647\n"
    assert result.stderr == expected
