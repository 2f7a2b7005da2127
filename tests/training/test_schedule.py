import math

import numpy as np
import pytest

from hymba_jax.config.training import TrainingConfig
from hymba_jax.training.schedule import learning_rate_schedule


def rates(*stages: TrainingConfig) -> list[float]:
    """The rate of every update of these stages."""
    schedule = learning_rate_schedule(stages)
    return [float(schedule(count)) for count in range(sum(stage.steps for stage in stages))]


def config(steps: int, schedule: str, warmup: int, peak: float, **options: float) -> TrainingConfig:
    options = {"min_learning_rate": 0.01, **options}
    return TrainingConfig(
        steps=steps, schedule=schedule, warmup_steps=warmup, learning_rate=peak, **options
    )


WSD = config(10, "wsd", 3, 0.1, decay_steps=4)
WSD_RATES = [0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1, 0.1, 0.0775, 0.055, 0.0325, 0.01]


def test_wsd_warms_up_stays_and_decays():
    np.testing.assert_allclose(rates(WSD), WSD_RATES, rtol=1e-6)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (0, 4), (4, 0)])
def test_wsd_may_lack_a_phase(warmup, decay):
    expected = {(0, 0): [0.4] * 4, (0, 4): [0.3, 0.2, 0.1, 0], (4, 0): [0.1, 0.2, 0.3, 0.4]}
    found = rates(config(4, "wsd", warmup, 0.4, decay_steps=decay, min_learning_rate=0.0))
    np.testing.assert_allclose(found, expected[warmup, decay], atol=1e-7)


def test_other_schedules_decay_to_the_end_or_not_at_all():
    decays = [0.1 * (9 - i) / 9 + 0.01 * i / 9 for i in range(1, 10)]
    cosine = [0.01 + 0.09 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(1, 10)]
    np.testing.assert_allclose(rates(config(10, "constant", 2, 0.1)), [0.05] + [0.1] * 9, rtol=1e-6)
    np.testing.assert_allclose(rates(config(10, "linear", 1, 0.1)), [0.1, *decays], rtol=1e-6)
    np.testing.assert_allclose(rates(config(10, "cosine", 1, 0.1)), [0.1, *cosine], rtol=1e-6)


def test_a_stage_warms_up_from_the_last_rate_of_the_one_before():
    stages = (
        config(3, "constant", 0, 0.1),
        config(2, "linear", 0, 0.1, min_learning_rate=0.02),
        config(3, "constant", 2, 0.06),
    )
    expected = [0.1] * 3 + [0.06, 0.02] + [0.04, 0.06, 0.06]
    np.testing.assert_allclose(rates(*stages), expected, rtol=1e-6)
