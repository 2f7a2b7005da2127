import numpy as np
from scipy.stats import median_abs_deviation

from hymba_jax.training.spikes import SpikeDetector


def test_spikes_are_those_of_the_definition():
    """Of losses with heavy tails, also where the detector is resumed."""
    losses = 3 + 0.1 * np.random.default_rng(0).standard_t(2, 600)
    detector, found = SpikeDetector(), []
    for i, loss in enumerate(losses.tolist()):
        if i % 100 == 50:
            detector = SpikeDetector(detector.losses)
        if detector.add(loss) is not None:
            found.append(i)
    expected = []
    for i in range(32, 600):
        before = losses[max(0, i - 128) : i]
        excess = losses[i] - np.median(before)
        if excess > 6 * median_abs_deviation(before, scale="normal"):
            expected.append(i)
    assert found == expected
    assert 3 < len(expected) < 60


def test_noise_and_trends_are_no_spikes():
    rng = np.random.default_rng(0)
    for losses in (rng.normal(3, 0.1, 2000), 10 * np.exp(-np.arange(500) / 100), [2.0, 2.01] * 200):
        detector = SpikeDetector()
        assert [detector.add(float(loss)) for loss in losses] == [None] * len(losses)
