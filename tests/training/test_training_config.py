import pytest

from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.errors import HymbaError


def test_every_bad_value_is_named_at_once():
    with pytest.raises(HymbaError) as caught:
        TrainingConfig(steps=0, clip_norm=0.0, beta2=1.0, warmup_fraction=1.7)
    for name in ("steps is 0", "clip_norm is 0.0", "beta2 is 1.0", "warmup_fraction is 1.7"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 6, "gradient_accumulation_steps": 4},
        {"batch_size": 6, "reduction_shards": 4},
        {"gradient_accumulation_steps": 2, "reduction_shards": 4},
        {"learning_rate": 1e-4, "min_learning_rate": 1e-3},
        {"learning_rate": float("nan")},
        {"weight_decay": -0.1},
        {"keep_checkpoints": 0},
        {"sample_tokens": -1},
        {"warmup_fraction": -0.1},
        {"warmup_fraction": float("nan")},
        {"steps": 2**31},
        {"batch_size": 10**12},
        {"keep_checkpoints": 10**400},
        {"log_every": 10**400},
        {"learning_rate": 1e39},  # infinite in float32
        {"learning_rate": 1e-50},  # 0 in float32
        {"weight_decay": float("inf")},
        {"clip_norm": float("inf")},
        {"z_loss": -1e-4},
        {"beta2": 0.9999999999},  # 1 in float32, which Adam divides by 0 with
        {"sample_temperature": float("nan")},
        {"ema_decay": 1.0},
        {"muon_momentum": 0.9},  # of an optimizer that is not used
    ],
)
def test_impossible_values_are_refused(change):
    with pytest.raises(HymbaError, match=next(iter(change))) as caught:
        TrainingConfig(**change)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_warmup_and_decay_never_overlap(steps):
    config = TrainingConfig(steps=steps, warmup_fraction=0.5, decay_fraction=0.5)
    assert sum(config.phase_steps) <= steps


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({}, (2, 20)),
        ({"warmup_steps": 7}, (7, 20)),
        ({"warmup_steps": 90}, (90, 10)),
        ({"decay_steps": 30, "warmup_fraction": 0.1}, (10, 30)),
        ({"schedule": "constant", "warmup_steps": 0}, (0, 0)),
        ({"schedule": "cosine"}, (2, 98)),
    ],
)
def test_phases_are_given_in_steps_or_fractions(options, phases):
    assert TrainingConfig(steps=100, **options).phase_steps == phases


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"warmup_fraction": 0.1, "warmup_steps": 1}, "both set"),
        ({"schedule": "linear", "decay_fraction": 0.1}, "of schedule wsd, not of linear"),
        ({"warmup_fraction": 0.7, "decay_fraction": 0.4}, "0.7 and decay_fraction 0.4 add up"),
        ({"warmup_steps": 60, "decay_steps": 60}, "more than the 100 steps"),
        ({"warmup_steps": 110}, "a warm-up of 110 and a decay of 0 steps are more than the 100"),
        ({"warmup_steps": 90, "decay_fraction": 0.2}, "a decay of 20 steps are more than the 100"),
        ({"schedule": "constant", "min_learning_rate": 1e-4}, "schedule constant does not use it"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(options, problem):
    with pytest.raises(HymbaError, match=problem):
        RunConfig(training=TrainingConfig(steps=100, **options))
