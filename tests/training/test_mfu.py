"""How fast a run is said to be, against counts by hand."""

import dataclasses

import jax
import pytest
from flax import nnx

from hymba_jax.config import PRESETS, AttentionConfig, ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.model import Hymba
from hymba_jax.model.flops import forward_flops, training_flops
from hymba_jax.training.mfu import Workload, peak_flops

CONFIG = HymbaConfig(
    vocab_size=11,
    hidden_size=8,
    mlp_size=12,
    layers="G Ww",
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, window=2, rope_type="default"),
    ssm=SSMConfig(state_size=4),
    num_meta_tokens=3,
)


def abstract(config, *, scan_layers):
    compute = ComputeConfig(scan_layers=scan_layers)
    return nnx.eval_shape(lambda: Hymba(config, compute, nnx.Rngs(0)))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_flops_by_hand(tie_embeddings):
    """Five tokens, of which two are predicted."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings)
    hidden, channels, heads, rank, state = 8, 16, 2, config.dt_rank, 4
    assert (config.channels, config.head_dim, config.value_dim) == (channels, 4, 8)
    own = 4 + 8  # of one head
    mixer = hidden * (heads * 4 + 2 * channels) + channels * (rank + 2 * state) + rank * channels
    layer = mixer + channels * hidden + 3 * hidden * 12
    kernels = 3 * layer + 2 * hidden * own  # the last layer reuses keys and values
    seen_by_all = [1, 2, 3, 4, 5]
    seen_in_window = [1, 2, 3, 3, 3]  # itself and two before
    pairs = sum(seen_by_all) + 2 * sum(seen_in_window) + 3 * 5 * 3  # and three meta tokens
    expected = (
        2 * (kernels * 5 + 2 * 11 * hidden)
        + 2 * heads * (4 + 8) * pairs
        + 3 * 5 * channels * (9 * state + 2 * config.ssm.conv_kernel)
    )
    for scan_layers in (True, False):
        assert abstract(config, scan_layers=scan_layers).flops(5, predicted=2) == expected
        assert forward_flops(config, 5, predicted=2) == expected


def test_about_six_flops_per_parameter_and_token():
    """The rule of thumb: what comes on top is attention, the scan, and a vocabulary used twice."""
    config = PRESETS["hymba-1.5b"]
    model = abstract(config, scan_layers=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert 1 < training_flops(config, 2048) / (6 * count * 2048) < 1.2


def test_rates():
    rates = Workload(tokens=4096, flops=2e12, devices=8, peak_flops=4e12).rates(seconds=2.0)
    assert rates == {
        "tokens_per_second": 2048.0,
        "tokens_per_second_per_device": 256.0,
        "mfu": 0.25,
    }
    assert "mfu" not in Workload(4096, 2e12, 8, None).rates(2.0)


def test_peak_is_known_or_not():
    assert peak_flops(["TPU v5 lite"] * 2) == pytest.approx(2 * 197e12)
    assert peak_flops(["TPU v5 lite", "cpu"]) is None
