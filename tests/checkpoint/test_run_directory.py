import dataclasses

import pytest
from training.tiny import MODEL

from hymba_jax.checkpoint.run_directory import (
    check_output,
    check_resumes,
    read_run,
    write_run_directory,
)
from hymba_jax.config import ComputeConfig
from hymba_jax.config.data import SourceConfig, WeightedSourceConfig
from hymba_jax.config.distill import DistillConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import StageConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data import DataConfig
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import build_tokenizer

DATA = DataConfig(tokenizer="bytes", sequence_length=16)


@pytest.fixture
def config(tmp_path):
    """A run that has a checkpoint."""
    config = RunConfig(
        str(tmp_path / "run"), model=dataclasses.replace(MODEL, vocab_size=259), data=DATA
    )
    write_run_directory(config, build_tokenizer(DATA.tokenizer, ()))
    (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
    return config


def test_the_directory_holds_config_and_tokenizer(config, tmp_path):
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoints", "config.toml", "tokenizer.json", "tokenizer_config.json"}
    assert RunConfig.from_toml(tmp_path / "run" / "config.toml") == config


def test_an_empty_directory_is_a_fresh_run(config, tmp_path):
    assert read_run(str(tmp_path / "other")) is None


def test_a_directory_without_checkpoint_is_a_fresh_run(config, tmp_path):
    (tmp_path / "run" / "checkpoints" / "10").rename(tmp_path / "run" / "checkpoints" / "10.tmp")
    assert read_run(config.output) is None


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"training": TrainingConfig(steps=5000, learning_rate=1e-4, gradient_accumulation_steps=2)},
        {"compute": ComputeConfig(dtype="bfloat16", remat="block")},
        {"data": dataclasses.replace(DATA, path="/another/place/of/the/same/text")},
        {"model": dataclasses.replace(MODEL, vocab_size="auto")},
    ],
)
def test_a_run_resumes_with_what_may_change(config, change):
    check_resumes(read_run(config.output), dataclasses.replace(config, **change), 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"training": TrainingConfig(batch_size=16)}, "training.batch_size was 8, is 16"),
        (
            {"training": TrainingConfig(validation_sequences=7)},
            "training.validation_sequences was 128, is 7",
        ),
        ({"compute": ComputeConfig(scan_layers=False)}, "compute.scan_layers was True, is False"),
        ({"model": MODEL}, "model.vocab_size was 259, is 61"),
        ({"data": DataConfig(tokenizer="bytes", sequence_length=8)}, "data.sequence_length was 16"),
    ],
)
def test_another_run_is_refused_by_name(config, change, named):
    with pytest.raises(HymbaError) as caught:
        check_resumes(read_run(config.output), dataclasses.replace(config, **change), 1)
    assert named in str(caught.value)


def test_the_dtype_of_a_teacher_is_fixed_while_its_stage_is_under_way(config):
    distilled = dataclasses.replace(
        config,
        distill=DistillConfig(teacher="teacher"),
        stages={"taught": StageConfig(steps=4, objective="distill"), "alone": StageConfig(steps=4)},
    )
    changed = dataclasses.replace(distilled, compute=ComputeConfig(dtype="bfloat16"))
    message = r"\(stages\.taught: compute\.dtype was 'float32', is 'bfloat16'\)"
    with pytest.raises(HymbaError, match=message):
        check_resumes(distilled, changed, 3)
    for step in (4, 5):
        check_resumes(distilled, changed, step)


def test_stages_that_have_all_gone_are_named(config):
    stages = {"one": StageConfig(steps=4), "two": StageConfig(steps=4)}
    staged = dataclasses.replace(config, stages=stages)
    with pytest.raises(HymbaError, match=r"\(it has the stages one, two, the config none\)"):
        check_resumes(staged, config, 1)
    check_resumes(config, staged, 1)


def test_sources_keep_their_order(config):
    """Of two that are due at the same time, the first is read first."""
    names = ("a", "b")
    first, second = (
        dataclasses.replace(
            config,
            data=dataclasses.replace(
                DATA, sources={name: WeightedSourceConfig(name) for name in order}
            ),
        )
        for order in (names, names[::-1])
    )
    check_resumes(first, first, 1)
    with pytest.raises(HymbaError, match=r"the order of sources was \['a', 'b'\], is \['b', 'a'\]"):
        check_resumes(first, second, 1)


def test_validation_sources_may_be_added_but_not_changed(config):
    def validated(**sources):
        return dataclasses.replace(config, data=dataclasses.replace(DATA, validation=sources))

    web, changed = SourceConfig("web"), SourceConfig("web", text_field="body")
    check_resumes(validated(web=web), validated(web=web, code=SourceConfig("code")), 1)
    with pytest.raises(HymbaError, match=r"data\.validation\.web\.text_field was '', is 'body'"):
        check_resumes(validated(web=web), validated(web=changed), 1)


def test_a_run_that_started_from_a_model_is_resumed_with_it(config):
    started = dataclasses.replace(config, init_from="runs/base")
    with pytest.raises(HymbaError, match="or give --init-from runs/base again"):
        check_resumes(started, dataclasses.replace(config, model=MODEL), 1)


def test_a_directory_of_another_program_is_refused(config, tmp_path):
    (tmp_path / "run" / "config.toml").unlink()
    with pytest.raises(HymbaError, match="no config"):
        read_run(config.output)


@pytest.mark.parametrize("start", ["run", "run/inside", ".", "link"])
def test_a_run_does_not_start_from_its_own_directory(config, tmp_path, start):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(HymbaError, match="is, contains or lies inside the init_from directory"):
        check_output(config.output, str(tmp_path / start))
    check_output(config.output, str(tmp_path / "run2"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.toml", "params/_METADATA"], r"holds a standalone model \(params\)"),
        (["config.json", "model.safetensors"], "has config.json, model.safetensors but no config"),
        (["tokenizer.json"], "has tokenizer.json but no config"),
        (["metrics.jsonl"], "has metrics.jsonl but no config"),
        (["pytorch_model-00001-of-00002.bin"], "has pytorch_model-00001-of-00002.bin but no conf"),
    ],
)
def test_a_directory_with_which_a_run_would_be_mixed_is_refused(tmp_path, files, message):
    fill(tmp_path / "other", files)
    with pytest.raises(HymbaError, match=f"^{tmp_path}/other: {message}"):
        check_output(str(tmp_path / "other"), "")


@pytest.mark.parametrize(
    "files", [[], ["log.txt", "slurm/7.out"], ["config.toml"], ["checkpoints/x"]]
)
def test_a_directory_with_other_files_is_not(config, tmp_path, files):
    check_output(config.output, "")
    fill(tmp_path / "other", files)
    check_output(str(tmp_path / "other"), "")


def fill(directory, files):
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
