import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_jax.checkpoint.model_file import read_model
from hymba_jax.config import PRESETS, ConfigError
from hymba_jax.config.data import SourceConfig, WeightedSourceConfig
from hymba_jax.config.distributed import DistributedConfig
from hymba_jax.config.field_types import leaves
from hymba_jax.config.run import RunConfig
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import build_tokenizer
from hymba_jax.training.arguments import parse_run

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


def test_dpo_alone_is_the_config_without_its_first_stage(tmp_path):
    head, _, dpo = (CONFIGS[0].parent / "dpo.toml").read_text().split("[[stages]]")
    (stage,) = RunConfig.from_toml(write(tmp_path, f"{head}[[stages]]{dpo}")).resolved_stages
    assert (stage.name, stage.run.training.batch_size) == ("dpo", 32)


FIELDS = dict(leaves(RunConfig(), ""))
CHOICES = ["auto", "default", "ntk", "bfloat16", "none", "relu2", "concat", "2*Ww", "bpe:300"]
VALUES = {
    bool: st.booleans(),
    int: st.integers() | st.integers(0, 2**12),
    float: st.floats() | st.floats(0, 1),
    str: st.text() | st.sampled_from(CHOICES),
    tuple: st.lists(st.text()),
    type(None): st.none() | st.integers(0, 2**12) | st.floats(0, 1),
}
CHANGES = st.one_of(st.tuples(st.just(name), VALUES[type(value)]) for name, value in FIELDS.items())


def replaced(config, changes):
    """The config with other values, which are named as in `leaves`."""
    parts = {}
    for name, value in changes.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    new = {
        part: values[""] if "" in values else replaced(getattr(config, part), values)
        for part, values in parts.items()
    }
    return dataclasses.replace(config, **new)


@settings(max_examples=100, deadline=None)
@given(changes=st.lists(CHANGES, min_size=1, max_size=2).map(dict))
def test_whatever_is_accepted_can_be_written_and_read(tmp_path_factory, changes):
    try:
        config = replaced(RunConfig(), changes)
    except HymbaError:
        return
    path = tmp_path_factory.getbasetemp() / "accepted.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert RunConfig.from_toml(path) == config


def test_the_path_of_a_teacher_is_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--training.objective", "distill", "--distill.teacher", "~/teacher"]
    run, _ = parse_run(options, "train.py")
    assert run.distill.teacher == str(tmp_path / "teacher")


@pytest.mark.parametrize("bad", ["inf", "nan", "-inf", "1e400"])
def test_the_command_line_takes_finite_numbers_alone(bad):
    with pytest.raises(HymbaError, match=r"rope_theta is -?(inf|nan), not finite"):
        parse_run([f"--model.attention.rope-theta={bad}"], "train.py")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "some.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert RunConfig.from_toml(path).seed == 3


@pytest.mark.parametrize("opening", ["[", "{a = "])
def test_deep_nesting_is_one_line(tmp_path, opening):
    assert refusal(tmp_path, "seed = " + opening * 100_000).startswith("not a TOML file (")


def test_a_first_small_config_needs_no_rope_settings(tmp_path):
    text = """
        [model]
        hidden_size = 64
        mlp_size = 128
        layers = "G W"
        max_positions = 512
        attention = { num_heads = 2, num_kv_heads = 1 }
    """
    model = RunConfig.from_toml(write(tmp_path, text)).model
    assert (model.rope_type, model.rope_base) == ("default", 10000.0)
    longer = dataclasses.replace(model, max_positions=4096)
    # SPEC: theta * (2 * max / orig - 1) ** (Dk / (Dk - 2)), orig 2048 and Dk 32.
    assert (longer.rope_type, longer.rope_base) == ("ntk", 10000.0 * 3 ** (32 / 30))
    assert longer.resolved().attention.rope_type == "ntk"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "auto"),
        ('[model]\npreset = "hymba-125m"', "auto"),
        ('[model]\npreset = "hymba-125m"\nvocab_size = 5000', 5000),
        ("[model]\nvocab_size = 5000", 5000),
    ],
)
def test_the_vocabulary_is_the_tokenizer_s_unless_it_is_named(tmp_path, text, expected):
    assert RunConfig.from_toml(write(tmp_path, text)).model.vocab_size == expected


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 259), ("bpe:1024", 1024), ("", 259)])
def test_the_vocabulary_before_there_is_text(tmp_path, tokenizer, size):
    build_tokenizer("bytes", []).save(tmp_path)
    text = f'[model]\npreset = "hymba-125m"\n[data]\ntokenizer = "{tokenizer or tmp_path}"'
    assert read_model(write(tmp_path, text))[0].vocab_size == size


def test_odd_texts_survive(tmp_path):
    config = RunConfig(output='runs/"quoted" \\ é \U0001f600\t\x7f')
    assert RunConfig.from_toml(write(tmp_path, config.to_toml())) == config


def test_a_preset_is_the_start_and_the_file_overrides_it(tmp_path):
    text = '[model]\npreset = "hymba-350m"\nmax_positions = 2048\nattention.window = 256\n'
    model = RunConfig.from_toml(write(tmp_path, text)).model
    expected = PRESETS["hymba-350m"]
    attention = dataclasses.replace(expected.attention, window=256)
    assert model == dataclasses.replace(
        expected, vocab_size="auto", max_positions=2048, attention=attention
    )


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
        ("seed = 1.5", "seed is 1.5, not an integer"),
        ("seed = true", "seed is True, not an integer"),
        ("output = 3", "output is 3, not a string"),
        ('[training]\nclip_norm = "1"', "training.clip_norm is '1', not a number"),
        ("[compute]\nscan_layers = 1", "compute.scan_layers is 1, not true or false"),
        (
            '[model.ssm]\ndt_rank = "big"',
            "model.ssm.dt_rank is 'big', not an integer or \"auto\"",
        ),
        (
            '[compute]\nremat = "all"',
            'compute.remat is \'all\', not "none" or "block" or "kernels" or "dots" or '
            '"activations"',
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
        (
            'model.attention.rope_type = "dynamic_ntk"\n[data]\nsequence_length = 2000\n'
            'validation_packing = "documents"',
            'run config: rope_type "dynamic_ntk" does not go with data.validation_packing "docum',
        ),
        ("[training]\nsteps = 0", "training config: steps is 0, below 1"),
        ("seed = -1", "run config: seed is -1, below 0"),
        ("seed = 4294967296", "run config: seed is 4294967296, above 4294967295: JAX takes 32"),
        ("model.attention.rope_theta = inf", "model.attention.rope_theta is inf, not finite"),
        ("model.attention.rope_theta = 1e400", "model.attention.rope_theta is inf, not finite"),
        ("model.attention.rope_theta = 0.5", "the model cannot be built: rope_theta is 0.5, below"),
        ("training.weight_decay = nan", "training.weight_decay is nan, not finite"),
        ("model.norm_eps = 1e-310", "the model cannot be built: norm_eps is 1e-310, below 1e-20: "),
        ("training.steps = 1e400", "training.steps is inf, not an integer"),
        ("training.steps = 0x" + "f" * 5000, "training.steps is a number of 20000 bits, beyond 64"),
        ("training.steps = " + "9" * 5000, "not a TOML file (Exceeds the limit"),
        ("training.steps = 2147483648", "training config: steps is 2147483648, above 2147483647: "),
        ("training.sample_temperature = 1e-40", "training config: sample_temperature is 1e-40: "),
        ("model.vocab_size = 1099511627776", "the model cannot be built: vocab_size is 1099511627"),
        ("model.attention.window = 1000000000000", "the model cannot be built: window is 10000000"),
        (
            "model.max_positions = 8388609",
            "the model cannot be built: max_positions is 8388609, ",
        ),
        (
            'model.layers = "99999999999*W"',
            "the model cannot be built: layers '99999999999*W': ",
        ),
        (
            'data.tokenizer = "bpe:999999999999"',
            "data config: tokenizer 'bpe:999999999999' needs",
        ),
        ("model = [1]", "model is [1], not a table"),
        ("model.preset = [1]", "model.preset is [1], not one of hymba-125m"),
        ("training.steps = {a = 1}", "training.steps is {'a': 1}, not an integer"),
        ("output = 1979-05-27", "output is datetime.date(1979, 5, 27), not a string"),
        ("data.sources = 3", "data.sources is 3: write tables [data.sources.NAME]"),
        ("data.sources.web = 3", "data.sources is {'web': 3}: write tables"),
        ("data.sources.web.wieght = 1", "unknown field data.sources.web.wieght, did you mean"),
        ('data.sources.web.weight = "1"', "data.sources.web.weight is '1', not a number"),
        ('data.sources."a/b".path = "c"', "data config: sources.'a/b': a name has letters, "),
        ("data.sources.web.weight = 1", "data config: sources.web.path is empty"),
        (
            'data.sources.web = {path = "a", weight = -1}',
            "data config: sources.web.weight is -1, below 0",
        ),
        (
            'data.sources.web = {path = "a", weight = nan}',
            "data.sources.web.weight is nan, not finite",
        ),
        (
            'data.sources.web = {path = "a", weight = 0}',
            "data config: no source has a weight above 0",
        ),
        (
            'data.path = "b"\ndata.sources.web.path = "a"',
            "data config: path is 'b', but there are sources",
        ),
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


def test_sources_are_tables_that_the_command_line_overrides(tmp_path):
    text = (
        '[data.sources.web]\npath = "~/web"\nweight = 3\n[data.validation.book]\npath = "gs://b/c"'
    )
    path = write(tmp_path, text)
    arguments = ["--config", str(path), "--data.sources.web.weight", "0.5"]
    data = parse_run(arguments, "train.py")[0].data
    assert data.sources == {"web": WeightedSourceConfig(str(Path.home() / "web"), weight=0.5)}
    assert data.validation == {"book": SourceConfig("gs://b/c")}
    more = write(tmp_path, '[data.sources]\ncode = {path = "code"}\nweb = {text_field = "body"}')
    base = RunConfig(data=data)
    assert RunConfig.from_toml(more, base).data.sources == {
        "web": dataclasses.replace(data.sources["web"], text_field="body"),
        "code": WeightedSourceConfig("code"),
    }


@pytest.mark.parametrize("table", ["sources", "validation"])
def test_sources_that_the_file_lacks_are_refused_on_the_command_line(tmp_path, table):
    path = write(tmp_path, f'[data.{table}.my_web]\npath = "web"')
    for name in ("my_web", "my-web"):
        parse_run(["--config", str(path), f"--data.{table}.{name}.path=b"], "train.py")
    option = f"--data.{table}.new.path"
    message = (
        f"{option}: the config has no source new: add a table [data.{table}.new] to the file that "
        "--config names"
    )
    with pytest.raises(HymbaError) as caught:
        parse_run(["--config", str(path), option, "d.parquet"], "train.py")
    assert str(caught.value) == message


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
