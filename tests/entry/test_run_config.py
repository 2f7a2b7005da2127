import dataclasses
from pathlib import Path

import pytest

from hymba_jax.config import PRESETS, ConfigError
from hymba_jax.distributed import DistributedConfig
from hymba_jax.errors import HymbaError
from hymba_jax.run_config import RunConfig, parse_run

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def write(tmp_path, text):
    path = tmp_path / "some.toml"
    path.write_text(text)
    return path


def refusal(tmp_path, text):
    """The one line that says what is wrong with a file, without its name."""
    path = write(tmp_path, text)
    with pytest.raises(HymbaError) as caught:
        RunConfig.from_toml(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_valid_and_say_what_they_cost(path):
    config = RunConfig.from_toml(path)
    assert path.stem in config.output
    header = path.read_text().partition("output")[0]
    for word in ("Command:", f"configs/{path.name}", "Hardware:", "Time:", "Result:"):
        assert word in header


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_survives_its_own_file(path, tmp_path):
    config = RunConfig.from_toml(path)
    assert RunConfig.from_toml(write(tmp_path, config.to_toml())) == config


def test_odd_texts_survive(tmp_path):
    config = RunConfig(output='runs/"quoted" \\ é \U0001f600\t\x7f')
    assert RunConfig.from_toml(write(tmp_path, config.to_toml())) == config


def test_a_preset_is_the_start_and_the_file_overrides_it(tmp_path):
    text = '[model]\npreset = "hymba-350m"\nmax_positions = 2048\nattention.window = 256\n'
    model = RunConfig.from_toml(write(tmp_path, text)).model
    expected = PRESETS["hymba-350m"]
    attention = dataclasses.replace(expected.attention, window=256)
    assert model == dataclasses.replace(expected, max_positions=2048, attention=attention)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[model]\nhiden_size = 3",
            "unknown field model.hiden_size, did you mean model.hidden_size?",
        ),
        (
            "[model.attention]\nheads = 3\n[trainin]\nsteps = 1",
            "unknown field model.attention.heads, did you mean model.attention.num_heads?; "
            "unknown field trainin, did you mean training?",
        ),
        (
            "zzz = 1",
            "unknown field zzz, there are output, seed, init_from, profile, model, compute, "
            "parallel, data, training",
        ),
        ("seed = 1.5", "seed is 1.5, not a whole number"),
        ("seed = true", "seed is True, not a whole number"),
        ("output = 3", "output is 3, not a text"),
        ('[training]\nclip_norm = "1"', "training.clip_norm is '1', not a number"),
        ("[compute]\nscan_layers = 1", "compute.scan_layers is 1, not true or false"),
        (
            '[model.ssm]\ndt_rank = "big"',
            "model.ssm.dt_rank is 'big', not a whole number or \"auto\"",
        ),
        (
            '[compute]\nremat = "all"',
            'compute.remat is \'all\', not "none" or "block" or "dots"',
        ),
        ("model = 3", "model is 3, not a table"),
        (
            '[model]\npreset = "hymba-7b"',
            "model.preset is 'hymba-7b', not one of hymba-125m, hymba-350m, hymba-1.5b",
        ),
        ("[model]\nhidden_size = 252", "the model cannot be built: hidden_size 252 is not a"),
        ("[model.attention]\nwindow = 0", "the model cannot be built: window is 0, below 1"),
        ('[model]\nlayers = "Gw"', "the model cannot be built: layers 'Gw': 'w' in 'Gw' reuses"),
        (
            "[data]\nsequence_length = 9000",
            "run config: data.sequence_length 9000 is longer than model.max_positions 8192",
        ),
        ("[training]\nsteps = 0", "training config: steps is 0, below 1"),
        ("seed = -1", "run config: seed is -1, below 0"),
        ("seed = ", "not a TOML file (Invalid value (at end of document))"),
    ],
)
def test_what_cannot_be_is_one_clear_line(tmp_path, text, message):
    assert refusal(tmp_path, text).startswith(message)


def test_a_file_that_is_missing_or_binary_is_named(tmp_path):
    with pytest.raises(HymbaError, match=r"gone.toml: no such file"):
        RunConfig.from_toml(tmp_path / "gone.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HymbaError, match=r"binary.toml: not UTF-8 text"):
        RunConfig.from_toml(tmp_path / "binary.toml")


def test_the_command_line_overrides_the_file(tmp_path):
    path = write(tmp_path, "[training]\nsteps = 7\nlog_every = 3\n")
    arguments = ["--config", str(path), "--training.steps", "9", "--model.hidden-size", "800"]
    config, _ = parse_run(arguments, "train.py")
    assert (config.training.steps, config.training.log_every) == (9, 3)
    assert config.model.hidden_size == 800
    assert parse_run([f"--config={path}"], "train.py")[0] == RunConfig.from_toml(path)
    assert parse_run([], "train.py") == (RunConfig(), DistributedConfig())


def test_the_command_line_is_checked_as_a_whole():
    with pytest.raises(ConfigError, match="hidden_size 252"):
        parse_run(["--model.hidden-size", "252"], "train.py")
    config, _ = parse_run(["--model.hidden-size", "256", "--model.attention.num-heads", "4",
                        "--model.attention.num-kv-heads", "2"], "train.py")  # fmt: skip
    assert config.model.head_dim == 64


def test_an_unknown_option_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_run(["--training.step", "3"], "train.py")
    assert caught.value.code == 2
    assert "--training.steps" in capsys.readouterr().err
