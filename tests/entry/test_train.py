import numpy as np
import pytest
from data.chat import TEMPLATE, expected_tokens, record, write_lines
from entry.command import HYMBA, read_metrics, run, train_py, write_config

import hymba_jax
from hymba_jax import cli
from hymba_jax.config.run import RunConfig
from hymba_jax.run_files import checkpoint_steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A finished run: its output directory, its config file and what it printed."""
    directory = tmp_path_factory.mktemp("finished")
    output = directory / "runs" / "mine"
    config = write_config(directory, output, layers="W")
    result = run(train_py("--config", config), cache)
    assert result.returncode == 0, result.stderr
    return output, config, result


def test_a_run_says_what_it_does(finished):
    output, _, result = finished
    lines = result.stdout.splitlines()
    assert lines[:2] == ["listing the files…", f"tokenizing {output.parents[1] / 'corpus'}…"]
    assert lines[2].startswith(f"{output}: ")
    assert "parameters in 1 layers, 1 x cpu; 4 steps, 768 tokens, of" in lines[2]
    assert "compiling the run…" in lines
    for step in range(1, 5):
        assert any(line.startswith(f"step {step}/4 {step * 25:3}%  loss ") for line in lines)
    assert any("bpb" in line and "tok/s" in line and "left" in line for line in lines)
    assert lines[-1] == f"done: {output}"
    assert result.stderr == ""


def test_the_output_is_complete(finished):
    output, _, _ = finished
    names = {path.name for path in output.iterdir()}
    assert names == {
        *("config.toml", "tokenizer.json", "tokenizer_config.json", "checkpoints"),
        *("metrics.jsonl", "starts.jsonl", "sample.txt", "tokens"),
    }
    # Two on schedule, and the one before the decay of the last step.
    assert checkpoint_steps(output) == [2, 3, 4]
    assert (output / "sample.txt").read_text().startswith("the")
    config = RunConfig.from_toml(output / "config.toml")
    assert config.model.vocab_size == 259  # the bytes and 3 special tokens of its tokenizer


def test_metrics_have_a_line_a_step_and_validation_where_asked(finished):
    lines = read_metrics(finished[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    always = {"step", "loss", "grad_norm", "learning_rate", "tokens_seen", "epoch"}
    validated = always | {"validation_loss", "validation_bits_per_byte"}
    last = validated | {"validation_sample_loss"}
    assert [set(line) for line in lines] == [always, always, validated, last]


@pytest.mark.slow
def test_several_devices_do_the_same_and_one_resumes(finished, cache, tmp_path):
    command = train_py("--config", finished[1], "--output", tmp_path, "--parallel.tensor", "2")
    devices = ("env", "XLA_FLAGS=--xla_force_host_platform_device_count=4")
    result = run(command, cache, devices)
    assert result.returncode == 0, result.stderr
    sharding = "4 devices, data 1 x fsdp 2 x sequence 1 x tensor 2; sharded: batch over 2"
    assert sharding in result.stdout
    assert "1 key/value heads by 2" in result.stdout
    for actual, expected in zip(read_metrics(tmp_path), read_metrics(finished[0]), strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)
    alone = ("--parallel.tensor", "1", "--training.steps", "5")
    result = run(train_py("--config", tmp_path / "config.toml", *alone), cache)
    assert result.returncode == 0, result.stderr
    assert "resuming after step 4" in result.stdout


def test_a_finished_run_can_be_prolonged_from_its_own_config(finished, cache):
    """By `hymba train`, which is the same command as train.py."""
    output, _, _ = finished
    before = read_metrics(output)
    command = [HYMBA, "train", "--config", output / "config.toml", "--training.steps", "6"]
    result = run([*command, "--training.sample-tokens", "0"], cache)
    assert result.returncode == 0, result.stderr
    assert "resuming after step 4" in result.stdout
    after = read_metrics(output)
    assert after[:4] == before
    assert [line["step"] for line in after[4:]] == [5, 6]


def test_generate_works_from_the_output_alone(finished, monkeypatch, capsys):
    monkeypatch.setattr("hymba_jax.inference.warmup.use_compilation_cache", lambda: None)
    command = ["generate", "--model", str(finished[0]), "--prompt", "the old"]
    cli.main([*command, "--max-new-tokens", "5"])
    printed = capsys.readouterr()
    assert printed.out.startswith("the old")
    assert printed.err == ""


def test_another_architecture_is_refused(finished):
    output, config, _ = finished
    before = (output / "config.toml").read_text()
    with pytest.raises(SystemExit) as stopped:
        cli.train(["--config", str(config), "--model.mlp-size", "48"])
    assert stopped.value.code.startswith(f"error: {output}: holds a run with different settings")
    assert "model.mlp_size was 32, is 48" in stopped.value.code
    assert (output / "config.toml").read_text() == before


def test_help_lists_fields(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert not stopped.value.code
    assert "--training.learning-rate" in capsys.readouterr().out


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_with_one_line(config, output, cache):
    small_files = ("bash", "-c", 'ulimit -f 24; exec "$@"', "bash")
    limit = ("env", "JAX_ENABLE_COMPILATION_CACHE=0", *small_files)
    result = run(train_py("--config", config), cache, limit)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {output}/checkpoints: a checkpoint cannot be written")
    assert "File too large" in line
    result = run(train_py("--config", config), cache)
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3, 4]


FINE_TUNING = """
output = "{directory}/tuned"

[data]
format = "chat"
chat_template = "{directory}/chat.jinja"
sequence_length = 24
packing = "documents"
validation_packing = "documents"
sources.reasoning.path = "{directory}/reasoning.jsonl"
sources.instructions.path = "{directory}/instructions.jsonl"
validation.held_out.path = "{directory}/held_out.jsonl"
validation.text.path = "{directory}/page.txt"
validation.text.format = "text"

[training]
batch_size = 4
learning_rate = 1e-2
log_every = 1
sample_prompt = "the"
sample_tokens = 4

[[stages]]
name = "sft-1"
steps = 2
sources.reasoning.weight = 1

[[stages]]
name = "sft-2"
steps = 2
sources.instructions.weight = 1
"""


def test_fine_tuning_on_conversations_in_two_stages(finished, cache, tmp_path):
    """The validation loss is that of the answers' tokens, as inference has it."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    held_out = [record("a", "the", "b", "old"), record("c", "dog")]
    write_lines(tmp_path / "held_out.jsonl", held_out)
    (tmp_path / "page.txt").write_text("the old dog ran. " * 9)
    records = [record(f"q {number}", "dog " * (number % 6 + 1)) for number in range(13)]
    write_lines(tmp_path / "reasoning.jsonl", records)
    write_lines(tmp_path / "instructions.jsonl", records[:5])
    path = tmp_path / "sft.toml"
    path.write_text(FINE_TUNING.format(directory=tmp_path))
    result = run([HYMBA, "train", "--config", path, "--init-from", finished[0]], cache)
    assert result.returncode == 0, result.stderr
    assert "reasoning: of 13 conversations 4 truncated, as they do not fit rows" in result.stdout
    lines = read_metrics(tmp_path / "tuned")
    assert [line["stage"] for line in lines] == ["sft-1", "sft-1", "sft-2", "sft-2"]
    assert lines[2]["loss"] < lines[0]["loss"]
    last = lines[-1]  # conversations have no bits per byte
    assert last["validation_bits_per_byte"] == last["validation_bits_per_byte/text"]
    assert "validation_bits_per_byte/held_out" not in last

    model = hymba_jax.load(tmp_path / "tuned")
    assert model.tokenizer.chat_template == TEMPLATE
    expected = [expected_tokens(each) for each in held_out]
    log_probs = model.log_probs([ids for ids, _ in expected])
    answers = np.concatenate(
        [values[mask[1:]] for values, (_, mask) in zip(log_probs, expected, strict=True)]
    )
    # The same numbers by two programs in float32.
    assert last["validation_loss/held_out"] == pytest.approx(-answers.mean(), rel=1e-5)
