"""What each policy of `compute.remat` runs again: matmul FLOPs of compiled gradients, by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxprs import equations

from hymba_jax.aot.hlo import Program
from hymba_jax.aot.instructions import instruction_costs
from hymba_jax.aot.topology import CHIPS
from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig
from hymba_jax.model import Hymba
from hymba_jax.ops.selective_scan.xla import _CHUNK

ROWS, LENGTH = 2, 24
HIDDEN, MLP, CHANNELS, RANK, STATE = 32, 64, 64, 2, 16
# A Mamba layer: the matmuls are projections and, in the scan, the sums over states.
CONFIG = HymbaConfig(
    vocab_size=16,
    hidden_size=HIDDEN,
    mlp_size=MLP,
    layers="M",
    num_meta_tokens=0,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
)
FLOPS_PER_ENTRY = 2 * ROWS * LENGTH  # of a kernel, and pass
MIXER = 3 * HIDDEN * CHANNELS + CHANNELS * (RANK + 2 * STATE) + RANK * CHANNELS
# The loop over the positions of a chunk is counted once.
SCAN_FORWARD = 2 * ROWS * math.ceil(LENGTH / _CHUNK) * STATE * CHANNELS


def gradient(remat, layers="M"):
    """Of a loss, by the parameters, and their shapes."""
    config = dataclasses.replace(CONFIG, layers=layers)
    compute = ComputeConfig(remat=remat, scan_layers=False)
    graph, params = nnx.split(Hymba.abstract(config, compute))
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)

    def loss(params):
        return nnx.merge(graph, params)(tokens).astype(jnp.float32).sum()

    return jax.grad(loss), params


@functools.cache
def flops(remat, layers="M"):
    function, params = gradient(remat, layers)
    compiled = jax.jit(function).lower(params).compile()
    costs = instruction_costs(Program(compiled.as_text()), CHIPS["v5e"])
    return sum(cost.flops for cost in costs)


def test_dots_runs_no_matmul_and_no_scan_again():
    assert flops("dots") == flops("none")


def test_kernels_runs_projections_again_but_not_the_scan():
    """All but the last projection, whose result no gradient needs."""
    again = FLOPS_PER_ENTRY * (MIXER + 2 * HIDDEN * MLP)
    assert flops("kernels") - flops("none") == again


def test_block_runs_projections_and_scan_again():
    assert flops("block") - flops("kernels") == SCAN_FORWARD


def test_block_runs_attention_again_and_kernels_does_not():
    """In a layer with both kinds of heads; XLA merges scores with those of the backward pass."""
    values = 2 * ROWS * LENGTH * LENGTH * CHANNELS
    assert flops("block", "G") - flops("kernels", "G") == values + SCAN_FORWARD


def test_masks_of_documents_are_no_inputs_of_a_scan_over_layers():
    """They would be read by every layer, one for each channel."""
    config = dataclasses.replace(CONFIG, layers="2*M")
    graph, params = nnx.split(Hymba.abstract(config, ComputeConfig(remat="block")))
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    segment_ids = jnp.asarray([[0] * 10 + [1] * 14] * ROWS)

    def loss(params):
        logits = nnx.merge(graph, params)(tokens, segment_ids=segment_ids)
        return logits.astype(jnp.float32).sum()

    scans = [
        equation
        for equation in jax.make_jaxpr(jax.grad(loss))(params).eqns
        if equation.primitive.name == "scan" and equation.params["length"] == 2
    ]
    assert len(scans) == 2  # forward and backward pass
    for scan in scans:
        assert (ROWS, LENGTH, CHANNELS) not in [array.aval.shape for array in scan.invars]


def count_in_gradient(remat, name):
    """How often the gradient has an operation."""
    function, params = gradient(remat)
    jaxpr = jax.make_jaxpr(function)(params).jaxpr
    return sum(equation.primitive.name == name for equation in equations(jaxpr))


@pytest.mark.parametrize("remat", ["block", "kernels", "dots", "activations"])
def test_only_block_computes_mean_squares_again(remat):
    """Of five norms a layer; the last of the model is in none."""
    again = 5 if remat == "block" else 0
    assert count_in_gradient(remat, "square") == 5 + again + 1


def test_activations_computes_no_gate_again():
    """Of three silus, the gradients of those of convolution and scan start from their inputs."""
    none, dots, activations = (
        count_in_gradient(remat, "logistic") for remat in ("none", "dots", "activations")
    )
    assert (dots - none, activations - none) == (3, 2)


def test_activations_runs_no_matmul_again():
    assert flops("activations") == flops("none")
