"""Stages: what each of them is, and configs that contradict themselves."""

import dataclasses
from pathlib import Path

import pytest

from hymba_jax.config.run import RunConfig
from hymba_jax.errors import HymbaError

RECIPE = """
[model]
max_positions = 2048

[data]
sequence_length = 1024

[data.sources.web]
path = "web"
weight = 3.0

[data.sources.books]
path = "books"

[training]
batch_size = 8
learning_rate = 0.004
warmup_steps = 10

[[stages]]
name = "stable"
steps = 100
schedule = "constant"

[[stages]]
name = "decay"
tokens = 500_000
warmup_fraction = 0
schedule = "linear"
min_learning_rate = 0.001
sources.books.weight = 2

[[stages]]
name = "extension"
steps = 50
batch_size = 2
sequence_length = 4096
max_positions = 4096
packing = "documents"
learning_rate = 0.001
"""


def read(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return RunConfig.from_toml(path)


def test_a_stage_is_the_run_with_its_own_fields(tmp_path):
    run = read(tmp_path, RECIPE)
    stable, decay, extension = run.resolved_stages
    assert [(s.name, s.start, s.stop) for s in (stable, decay, extension)] == [
        *(("stable", 0, 100), ("decay", 100, 162), ("extension", 162, 212))  # 61.03 steps
    ]
    assert (stable.decay_start, decay.decay_start, extension.decay_start) == (None, 100, 202)
    assert {name: s.weight for name, s in stable.run.data.sources.items()} == {"web": 3, "books": 1}
    assert {name: s.weight for name, s in decay.run.data.sources.items()} == {"web": 0, "books": 2}
    assert [s.run.model.rope_type for s in run.resolved_stages] == ["default", "default", "ntk"]
    assert [s.tokens_per_step for s in run.resolved_stages] == [8192] * 3
    assert extension.run.data.packing == "documents"
    assert (decay.run.training.warmup_steps, decay.run.training.phase_steps) == (None, (0, 62))
    assert [run.stage_at(step).name for step in (0, 1, 100, 101, 163, 999)] == [
        *("stable", "stable", "stable", "decay", "extension", "extension")
    ]
    assert stable.run == dataclasses.replace(
        run,
        stages={},
        training=dataclasses.replace(run.training, steps=100, schedule="constant"),
    )


@pytest.mark.parametrize(("loss", "compared"), [("sigmoid", False), ("simpo", True)])
def test_losses_relative_to_other_references_are_not_compared(tmp_path, loss, compared):
    """The reference of each stage is the model that it began with; SimPO has none."""
    stages = "".join(
        f'[[stages]]\nname = "{name}"\nsteps = 9\nobjective = "dpo"\n' for name in ("one", "two")
    )
    source = '[data.sources.pairs]\npath = "pairs"\nformat = "preference"\n'
    packing = '[data]\npacking = "documents"\nvalidation_packing = "documents"\n'
    run = read(tmp_path, f'{packing}{source}[dpo]\nloss = "{loss}"\n{stages}')
    one, two = run.resolved_stages
    assert (one.validated_on == two.validated_on) == compared


def test_a_run_without_stages_is_one():
    run = RunConfig()
    (stage,) = run.resolved_stages
    assert (stage.name, stage.start, stage.stop) == ("", 0, run.training.steps)
    assert stage.run is run


def test_toml_keeps_stages_and_their_order(tmp_path):
    run = read(tmp_path, RECIPE)
    again = read(tmp_path, run.to_toml())
    assert again == run
    assert list(again.stages) == ["stable", "decay", "extension"]
    assert run.to_toml().count("[[stages]]") == 3


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("steps = 100", "", "stages.stable: set its length, either steps or tokens"),
        ("steps = 100", "steps = 100\ntokens = 9", "stages.stable: set its length, either"),
        (
            "sources.books.weight",
            "sources.code.weight",
            r"sources.code: is not among .*there are web, books",
        ),
        ("books.weight = 2", "books.weight = 0", "no source has a weight above 0"),
        (
            "batch_size = 2",
            'validate_on = ["code"]',
            "stages.extension: .*validate_on: code is no source of validation, there are web, bo",
        ),
        ("batch_size = 2", "batch_size = 0", "stages.extension: training config: batch_size is 0"),
        (
            "max_positions = 4096",
            "",
            "sequence_length 4096 is longer than model.max_positions 2048",
        ),
        (
            "max_positions = 4096",
            'max_positions = 4096\nrope_type = "dynamic_ntk"',
            'stages.extension: run config: rope_type "dynamic_ntk" does not go with data.packing '
            '"documents" in sequences of more than 1920 tokens',
        ),
        ('name = "decay"', "", r"\[\[stages\]\] number 2 has no name"),
        ('name = "decay"', 'name = "stable"', "number 2 has the name 'stable', as another one has"),
        ('name = "decay"', 'name = "a b"', "a name has letters, digits, - and _ only"),
        ("steps = 50", "step = 50", "unknown field stages.extension.step, did you mean"),
        ("warmup_steps = 10", "steps = 10", "training.steps has no effect, as every stage sets"),
        ("warmup_steps = 10", "warmup_steps = 2000", "stages.stable: .*a warm-up of 2000 and"),
        (
            'schedule = "constant"',
            'schedule = "constant"\nmin_learning_rate = 1e-4',
            "stages.stable: run config: min_learning_rate is 0.0001, and schedule constant does",
        ),
        ("tokens = 500_000", "tokens = 0", "stages.decay: tokens is 0, below 1"),
        (
            "tokens = 500_000",
            "tokens = 500_000\nbatch_size = 0",
            "stages.decay: training config: batch_size is 0, below 1",
        ),
        (
            "tokens = 500_000",
            "tokens = 500_000\nsequence_length = 0",
            "stages.decay: data config: sequence_length is 0, below 1",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused(tmp_path, old, new, problem):
    assert RECIPE.count(old) == 1
    with pytest.raises(HymbaError, match=problem):
        read(tmp_path, RECIPE.replace(old, new))


def test_settings_that_every_stage_replaces_are_refused(tmp_path):
    """And not those that one of them uses: a long warm-up, the weights of sources, a decay."""
    long = RECIPE.replace("warmup_steps = 10", "warmup_steps = 1500\ndecay_steps = 9")
    long = long.replace("steps = 100", "steps = 3000").replace("steps = 50", "steps = 2000")
    assert read(tmp_path, long).resolved_stages[2].run.training.phase_steps == (1500, 9)
    linear = long.replace("packing =", 'schedule = "linear"\npacking =')
    with pytest.raises(HymbaError, match=r"training\.decay_steps has no effect, as every stage"):
        read(tmp_path, linear)
    named = RECIPE.replace("steps = 100", "steps = 100\nsources.web.weight = 1")
    named = named.replace("steps = 50", "steps = 50\nsources.web.weight = 1")
    with pytest.raises(HymbaError, match=r"data\.sources\.web\.weight has no effect, as every"):
        read(tmp_path, named)


def test_a_least_rate_is_refused_where_no_schedule_uses_it(tmp_path):
    """Whether the stages are constant themselves or by the run."""
    rate = "learning_rate = 0.004"
    least = f'{rate}\nmin_learning_rate = 0.002\nschedule = "constant"'
    constant = RECIPE.replace(rate, least).replace(
        'schedule = "linear"\nmin_learning_rate = 0.001\n', ""
    )
    with pytest.raises(HymbaError, match=r"training\.min_learning_rate has no effect, as every"):
        read(tmp_path, constant)
    decays = constant.replace("steps = 50", 'steps = 50\nschedule = "linear"')
    decays = decays.replace("learning_rate = 0.001\n", "")
    stage = read(tmp_path, decays).resolved_stages[-1]
    assert stage.run.training.min_learning_rate == 0.002


def test_stages_that_are_not_an_array_are_refused(tmp_path):
    with pytest.raises(HymbaError, match=r"write tables \[\[stages\]\], each with a name"):
        read(tmp_path, "[stages.first]\nsteps = 1\n")
