"""Adapters of linear maps: against peft, and what dropout drops."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.model import Hymba, merge_adapters, unstack_layers
from hymba_jax.model.layers import Linear
from hymba_jax.model.lora import LoRA, column_norms, reset_magnitudes, set_dropout

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = ("lora", "rslora", "dora")
CONFIG = HymbaConfig(
    vocab_size=61,
    hidden_size=16,
    mlp_size=24,
    layers="2*W",
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, window=4),
    num_meta_tokens=3,
    max_positions=64,
)
DORA = AdapterConfig(kind="dora", rank=3, dropout=0.5)
TOKENS = jnp.array(np.random.default_rng(0).integers(3, 61, (2, 9)))
SEEDS = jnp.array([7, 2**32 - 1], jnp.uint32)


class Net(nnx.Module):
    """out_proj(silu(in_proj(x))) with the weights of a golden case."""

    def __init__(self, kind):
        self.directory = GOLDEN / f"peft-{kind}"
        base = load_file(self.directory / "base.safetensors")
        tensors = load_file(self.directory / "adapter_model.safetensors")
        adapter = AdapterConfig(kind=kind, rank=3, alpha=5.0)
        for name in ("in_proj", "out_proj"):
            kernel = base[f"{name}.weight"].T
            linear = Linear(*kernel.shape, ("hidden", "mlp"), ComputeConfig(), nnx.Rngs(0))
            linear.kernel[...] = jnp.asarray(kernel)
            linear.adapter = LoRA(linear, adapter, nnx.Rngs(0))
            held = {
                key.removeprefix(f"base_model.model.{name}."): tensor
                for key, tensor in tensors.items()
                if f".{name}." in key
            }
            linear.adapter.A.kernel[...] = jnp.asarray(held["lora_A.weight"].T)
            linear.adapter.B.kernel[...] = jnp.asarray(held["lora_B.weight"].T)
            if kind == "dora":
                linear.adapter.magnitude[...] = jnp.asarray(held["lora_magnitude_vector"])
            setattr(self, name, linear)

    def __call__(self, x):
        return self.out_proj(jax.nn.silu(self.in_proj(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(kind):
    """To a few times the noise floor of 4e-6 of the golden outputs."""
    net = Net(kind)
    golden = dict(np.load(net.directory / "golden.npz"))
    graph, params = nnx.split(net)
    x, r = jnp.asarray(golden["x"]), jnp.asarray(golden["r"])
    np.testing.assert_allclose(net(x), golden["y"], rtol=0, atol=5e-5)

    grads = nnx.to_pure_dict(jax.grad(lambda p: (nnx.merge(graph, p)(x) * r).sum())(params))
    for name, wanted in load_file(net.directory / "adapter_grads.safetensors").items():
        _, _, linear, what, *_ = name.split(".")
        of_adapter = grads[linear]["adapter"]
        if what == "lora_magnitude_vector":
            gradient = of_adapter["magnitude"]
        else:
            gradient = of_adapter[what[-1]]["kernel"].T
        atol = 1e-4 * np.abs(wanted).max()
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=atol, err_msg=name)

    merged = merge_adapters(net)
    for name, wanted in load_file(net.directory / "merged.safetensors").items():
        kernel = getattr(merged, name.partition(".")[0]).kernel[...]
        np.testing.assert_allclose(kernel.T, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(merged(x), golden["y"], rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def base():
    return Hymba(CONFIG, ComputeConfig(), nnx.Rngs(0))


@pytest.fixture
def adapted():
    """A model with stacked layers whose adapter has been trained."""
    model, rng = Hymba(CONFIG, ComputeConfig(), nnx.Rngs(0), DORA), np.random.default_rng(1)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if "adapter" in path:
            leaf[...] += 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    return model


def forward(model, seeds=None, tokens=TOKENS):
    graph, params = nnx.split(model)

    def run(params, tokens, seeds):
        model = nnx.merge(graph, params)
        if seeds is not None:
            set_dropout(model, seeds)
        return model(tokens)

    return np.asarray(jax.jit(run)(params, tokens, seeds))


def test_a_new_adapter_changes_nothing(base):
    adapted = Hymba(CONFIG, ComputeConfig(), nnx.Rngs(0), dataclasses.replace(DORA, dropout=0.0))
    flat = dict(nnx.to_flat_state(nnx.state(adapted)))
    for path, leaf in nnx.to_flat_state(nnx.state(base)):  # nor what is initialized beside it
        np.testing.assert_array_equal(flat[path][...], leaf[...], err_msg=str(path))
    # m / norm(W) is 1 but for the rounding of one division per matmul.
    np.testing.assert_allclose(forward(adapted), forward(base), rtol=0, atol=2e-6)


def test_stacked_unstacked_and_merged_agree(base, adapted):
    """In another order of sums: to float32 rounding of logits of about 1."""
    outputs = forward(adapted)
    assert np.abs(outputs - forward(base)).max() > 0.01
    np.testing.assert_allclose(forward(unstack_layers(adapted)), outputs, rtol=0, atol=1e-5)
    merged = merge_adapters(adapted)
    np.testing.assert_allclose(forward(merged), outputs, rtol=0, atol=1e-5)
    assert nnx.graphdef(merged) == nnx.graphdef(base)


def test_dropout_depends_on_the_seed_of_the_row_alone(adapted):
    dropped = forward(adapted, SEEDS)
    assert np.abs(dropped - forward(adapted)).max() > 0.01
    unstacked = forward(unstack_layers(adapted), SEEDS)
    np.testing.assert_allclose(unstacked, dropped, rtol=0, atol=1e-5)
    alone = forward(adapted, SEEDS[1:], TOKENS[1:])
    np.testing.assert_allclose(alone[0], dropped[1], rtol=0, atol=1e-5)
    assert np.abs(forward(adapted, SEEDS[::-1]) - dropped).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_peft(kind):
    """In float64: of the update alone, whose inputs are scaled up; in DoRA the kernel is a part of
    the update (peft/tuners/lora/dora.py)."""
    rng = np.random.default_rng(2)
    linear = Linear(6, 5, ("hidden", "mlp"), ComputeConfig(), nnx.Rngs(0))
    linear.adapter = lora = LoRA(linear, AdapterConfig(kind, 2, 3.0, 0.25), nnx.Rngs(1))
    W, A, B, m = rng.normal(size=(6, 5)), rng.normal(size=(6, 2)), rng.normal(size=(2, 5)), 1.5
    linear.kernel[...], lora.A.kernel[...], lora.B.kernel[...] = (
        jnp.asarray(array, jnp.float32) for array in (W, A, B)
    )
    if kind == "dora":
        lora.magnitude[...] = jnp.full(5, m)
    lora.row_keys = nnx.Variable(jax.vmap(jax.random.key)(SEEDS))
    x = rng.normal(size=(2, 4000, 6))
    kept = np.stack([jax.random.bernoulli(jax.random.key(seed), 0.75, (4000, 6)) for seed in SEEDS])
    assert abs(kept.mean() - 0.75) < 0.01  # 5 standard deviations
    dropped = np.where(kept, x / 0.75, 0)
    s = 3.0 / (2**0.5 if kind == "rslora" else 2)
    expected = x @ W + s * dropped @ A @ B
    if kind == "dora":
        scale = m / np.linalg.norm(W + s * A @ B, axis=0)
        expected = x @ W + (scale - 1) * (dropped @ W) + scale * s * (dropped @ A @ B)
    y = linear(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_base_in_bfloat16_has_an_adapter_in_float32():
    model = Hymba(
        CONFIG, ComputeConfig(dtype="bfloat16", param_dtype="bfloat16"), nnx.Rngs(0), DORA
    )
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "kernel" or "adapter" in path:
            assert leaf.dtype == ("float32" if "adapter" in path else "bfloat16"), path


def test_magnitudes_are_those_of_the_kernels(adapted):
    reset_magnitudes(adapted)
    linear = adapted.groups[0].group.blocks[0].mlp.up_proj
    norms = np.linalg.norm(np.float64(linear.kernel[...]), axis=1)  # (layers, in, out)
    np.testing.assert_allclose(linear.adapter.magnitude[...], norms, rtol=1e-6)
    np.testing.assert_allclose(column_norms(linear.kernel[...]), norms, rtol=1e-6)
