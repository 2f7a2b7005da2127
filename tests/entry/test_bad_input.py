"""Each bad input: one clear line, an exit status that isn't 0, nothing written."""

import json
import signal

import pytest
from entry.command import run, train_py

from hymba_jax import cli
from hymba_jax.checkpoint.train_state import TrainState


def refusal(*arguments):
    """The one line that the command stops with."""
    with pytest.raises(SystemExit) as caught:
        cli.train([str(argument) for argument in arguments])
    message = caught.value.code  # a text is printed, and exits with status 1
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_a_bad_value_in_a_process_of_its_own(config, output, cache):
    result = run(train_py("--config", config, "--model.attention.num-kv-heads", "3"), cache)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: the model cannot be built: num_heads 2 is not a multiple of num_kv_heads 3\n"
    )
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.attention.num-heads", "3"], "not a multiple of num_heads 3"),
        (["--model.attention.window", "0"], "window is 0"),
        (["--model.layers", "G w"], "the layer before it has no window attention"),
        (["--model.layers", "WGw"], "only adjacent layers of one kind can share them"),
        (["--data.sequence-length", "65"], "longer than model.max_positions 64"),
        (["--training.sample-tokens", "61"], "sample_tokens make 65 tokens"),
        (
            ["--training.batch-size", "9"],
            "9 sequences, which data 1 x fsdp 8 devices cannot",
        ),
        (["--training.clip-norm", "0"], "clip_norm is 0.0, below 1e-30"),
        (
            ["--data.tokenizer", "bpe:300", "--model.vocab-size", "259"],
            "tokens, model.vocab_size is 259",
        ),
        (["--model.hidden-size", "65536", "--model.mlp-size", "1000000"], "optimizer state take"),
        (["--model.attention.rope-theta", "inf"], "rope_theta is inf, not finite"),
        (["--model.bos-token-id", "7"], "does not fit: its bos token is 1, model.bos_token_id"),
        (["--data.tokenizer", "nothing"], "unknown tokenizer 'nothing'"),
        (["--data.path", "/no/such/place"], "/no/such/place"),
    ],
)
def test_impossible_values(config, output, arguments, message):
    assert message in refusal("--config", config, *arguments)
    assert not output.exists()


def test_a_run_without_a_model(tmp_path, output):
    """It is not one of 1.5B parameters by default."""
    config = tmp_path / "data.toml"
    config.write_text("[training]\nsteps = 3\n")
    for arguments in ([], ["--config", config]):
        message = refusal("--output", output, *arguments)
        assert message.startswith("error: no model is named: use --config configs/tiny.toml, or")
    message = refusal("--model.hidden-size", "0", "--output", output)
    assert "no model is named" not in message
    assert not output.exists()


def test_an_unknown_field_in_the_file(config, output):
    config.write_text(config.read_text().replace("mlp_size", "mlp_sise"))
    assert "unknown field model.mlp_sise, did you mean model.mlp_size?" in refusal(
        "--config", config
    )
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no files to read (left out: empty files: 1)"),
        ("binary.txt", b"\x00\xff\xfe\x01" * 100, "binary.txt"),
        ("broken.jsonl", b'{"text": "one"}\n{"text": "two"\n', "broken.jsonl:2: broken JSON"),
        ("other.jsonl", b'{"body": "one"}\n', "no field 'text'"),
    ],
)
def test_unusable_data(config, output, tmp_path, name, content, message):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(content)
    assert message in refusal("--config", config, "--data.path", folder)
    # What was tokenized before the problem stays, for the next start to continue.
    assert not output.exists() or [path.name for path in output.iterdir()] == ["tokens"]


def test_a_tokenizer_file_that_is_none(config, output, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"not": "a tokenizer"}))
    assert f"{path}: " in refusal("--config", config, "--data.tokenizer", path)
    assert not output.exists()


def test_an_output_below_a_file(config, tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal("--config", config, "--output", tmp_path / "file" / "run")
    assert f"{tmp_path}/file/run" in message


def test_an_output_that_cannot_be_written(config, output, monkeypatch):
    def no_space(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    for costly, nothing in (("compile_stage", None), ("init_state", TrainState({}, ()))):
        monkeypatch.setattr(f"hymba_jax.training.loop.{costly}", lambda *_, value=nothing: value)
    message = refusal("--config", config)
    assert message == (
        f"error: {output}/tokens: cannot be written (No space left on device): make room and run "
        "the same command again to resume"
    )
    assert not list(output.glob("*.toml*"))


def test_a_checkpoint_of_another_program(config, output):
    (output / "checkpoints" / "100").mkdir(parents=True)
    message = refusal("--config", config)
    assert message.startswith(f"error: {output}: has checkpoints but no config.toml")
    assert [path.name for path in output.iterdir()] == ["checkpoints"]


def test_interrupting_says_how_to_resume(config, output, monkeypatch, capsys):
    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("hymba_jax.training.loop.train", interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.train(["--config", str(config)])
    assert caught.value.code == 130
    said = f"stopped by Ctrl-C: {output} has no checkpoint yet, "
    assert capsys.readouterr().err == f"\n{said}the same command starts from scratch\n"


@pytest.mark.slow  # tests/training/test_recorder.py has the message, of a recorder alone
def test_a_run_that_diverges_stops_before_it_is_saved(config, output, cache):
    rate = ["--training.learning-rate", "1e30", "--training.warmup-fraction", "0"]
    result = run(train_py("--config", config, *rate), cache)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: step 2: the loss is ")
    assert "check the data and the metrics of earlier steps" in line
    assert not list((output / "checkpoints").iterdir())
