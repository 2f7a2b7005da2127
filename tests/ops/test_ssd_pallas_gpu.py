"""SSD's kernels for GPUs in Pallas's interpret mode, against the float64 reference of `test_ssd`.

As in `test_attention_pallas_gpu`, XLA's matmuls stand in for the matrix instructions; the operands
are those in bfloat16 that the kernels make.
"""

from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jaxprs import stated_costs
from slow import slow_but
from test_kernel_cost import gradient
from test_selective_scan import float64, make_marks, on_device, with_gradients
from test_ssd import (
    OPTIONAL,
    SEQUENCES,
    gradients_in_float64,
    make_inputs,
    make_weights,
    oracle,
)
from wgmma_in_float32 import multiply_add

from hymba_jax.ops.remat import SCAN
from hymba_jax.ops.ssd import gpu_kernels, ssd
from hymba_jax.ops.ssd.api import fastest

CHUNK = 8
# Relative to the largest entry: bfloat16 rounds weights, states and results at 4e-3.
TOLERANCE = 1e-2
scan = partial(ssd, implementation="pallas_gpu")


@pytest.fixture
def interpreted():
    """With chunks so small that short sequences have several."""

    with (
        plgpu.force_gpu_interpret_mode(),
        patch.object(gpu_kernels, "CHUNK", CHUNK),
        patch.object(gpu_kernels, "multiply_add", multiply_add),
        jax.default_matmul_precision("highest"),
    ):
        yield


def in_bfloat16(inputs):
    return {
        k: jnp.asarray(v, jnp.bfloat16 if k in SEQUENCES else jnp.float32)
        for k, v in inputs.items()
    }


CASES = {
    # batch, length, heads, groups, channels of a head, states; two heads of a group share a block.
    "documents": ((2, 21, 2, 1, 3, 5), (), True),
    "groups": ((1, 11, 4, 2, 3, 5), (), False),
    "a whole sequence": ((1, 19, 3, 1, 5, 3), (), False),
    "no optional inputs": ((2, 21, 2, 2, 3, 5), OPTIONAL, True),
    "one chunk": ((1, 8, 1, 1, 3, 5), (), False),
    "part of a chunk": ((1, 3, 2, 1, 3, 5), (), False),
}


@pytest.mark.parametrize("name", slow_but(CASES, "documents", "groups"))
@pytest.mark.usefixtures("interpreted")
def test_values_and_gradients(name):
    assert_conforms(*CASES[name])


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_chunks_as_they_are():
    """And heads and states of a Mamba2."""
    with patch.object(gpu_kernels, "CHUNK", 64):
        assert_conforms((2, 150, 2, 1, 64, 128), (), has_marks=True)


def assert_conforms(sizes, without, has_marks):
    """Values against the oracle, and gradients against those in float64."""
    inputs, (of_y, of_state) = in_bfloat16(make_inputs(*sizes, without)), make_weights(*sizes)
    weights = (jnp.asarray(of_y, jnp.bfloat16), jnp.asarray(of_state))
    marks = make_marks(*sizes[:2]) if has_marks else {}
    outputs, gradients = with_gradients(scan, inputs, on_device(marks), weights)
    assert [v.dtype for v in outputs] == [jnp.bfloat16, jnp.float32]
    assert {k: v.dtype for k, v in gradients.items()} == {k: v.dtype for k, v in inputs.items()}
    exact = gradients_in_float64(float64(inputs), weights, **marks)
    expected = dict(zip(("y", "state"), oracle(**float64(inputs), **marks), strict=True))
    actual = dict(zip(("y", "state"), outputs, strict=True)) | gradients
    for key, value in (expected | exact).items():
        error = np.abs(np.asarray(actual[key], np.float64) - value).max()
        assert error <= TOLERANCE * np.abs(value).max(), key


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_documents_do_not_see_each_other():
    """Values and gradients of one are the same to the last bit, whatever the others hold."""
    sizes = (1, 21, 2, 1, 3, 5)
    inputs, (of_y, of_state) = make_inputs(*sizes), make_weights(*sizes)
    first, end = CHUNK // 2, CHUNK + CHUNK // 2
    outside = np.ones(sizes[:2], bool)
    outside[:, first:end] = False
    marks = on_device({"segment_ids": np.digitize(np.arange(21), [first // 2, first, end])[None]})
    weights = jnp.asarray(np.where(outside[..., None, None], 0, of_y), jnp.bfloat16), 0 * of_state
    changed = {k: v.copy() for k, v in inputs.items()}
    for name in SEQUENCES:
        changed[name][outside] *= np.float32(-3)
    (y, _), gradients = with_gradients(scan, in_bfloat16(inputs), marks, weights)
    (other, _), other_gradients = with_gradients(scan, in_bfloat16(changed), marks, weights)
    np.testing.assert_array_equal(y[~outside], other[~outside])
    jax.tree.map(np.testing.assert_array_equal, gradients, other_gradients)
    assert all(np.asarray(gradient).any() for gradient in gradients.values())
    assert not any(np.asarray(gradients[name])[outside].any() for name in SEQUENCES)


@pytest.mark.slow
@pytest.mark.parametrize(("dt", "rate"), [(-np.inf, -1.0), (0.0, -1e6)])
@pytest.mark.usefixtures("interpreted")
def test_extreme_decays(dt, rate):
    """A time step of zero leaves the state as it is, to the last bit; where exp underflows, it is
    forgotten and nothing is NaN."""
    sizes = (1, 19, 2, 1, 3, 5)
    inputs = in_bfloat16(make_inputs(*sizes))
    inputs |= {"dt": jnp.full_like(inputs["dt"], dt), "A": jnp.full_like(inputs["A"], rate)}
    of_y, of_state = make_weights(*sizes)
    weights = (jnp.asarray(of_y, jnp.bfloat16), of_state)
    outputs, gradients = with_gradients(scan, inputs, {}, weights)
    if dt == 0:
        assert not np.any(gradients["initial_state"])
    else:
        np.testing.assert_array_equal(outputs[1], inputs["initial_state"])
    for array in (*outputs, *gradients.values()):
        assert np.isfinite(np.asarray(array, np.float32)).all()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "state"),
    [("float32", 64, 128), ("bfloat16", 80, 128), ("bfloat16", 64, 136)],
)
def test_what_it_does_not_support_is_refused(dtype, head_dim, state):
    x, B = jnp.zeros((1, 4, 2, head_dim), dtype), jnp.zeros((1, 4, 1, state), dtype)
    message = rf"supports bfloat16, up to 64 channels .* not {dtype}, .* {head_dim} and {state}"
    with pytest.raises(ValueError, match=message):
        scan(x, x[..., 0], jnp.zeros(2), B, B)


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("gpu", "bfloat16", "pallas_gpu"),
        ("gpu", "float32", "chunked"),
        ("cpu", "bfloat16", "chunked"),
    ],
)
def test_the_platform_chooses(platform, dtype, expected):
    kind = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=kind)
    x, B = jnp.zeros((1, 4, 2, 64), dtype), jnp.zeros((1, 4, 1, 128), dtype)
    with jax.sharding.use_abstract_mesh(mesh):
        assert fastest(x, B, B) == expected


def arrays():
    """Two rows, 128 positions, 16 heads of 64 channels, 128 states: two chunks, and two blocks of
    heads that share B and C."""
    x, dt, B = (
        jax.ShapeDtypeStruct((2, 128, *shape), jnp.bfloat16)
        for shape in ((16, 64), (16,), (1, 128))
    )
    of_heads = jax.ShapeDtypeStruct((16,), jnp.float32)
    return x, dt, of_heads, B, B, of_heads


def test_what_is_kept_is_not_computed_again():
    """Under `compute.remat`: one kernel forward, and three back."""
    policies = jax.checkpoint_policies
    kept, again = policies.save_only_these_names(SCAN), policies.nothing_saveable
    for policy, kernels in ((kept, 4), (again, 5)):
        function = gradient(jax.checkpoint(scan, policy=policy))
        assert len(stated_costs(function, *arrays())) == kernels


def test_kernels_state_their_matmuls_and_bytes():
    costs = stated_costs(gradient(scan), *arrays())
    positions, chunk = 2 * 128 * 16, 64
    of_state = 64 * 128
    per_position = [
        chunk * (128 + 64) + 2 * of_state,  # C B and weights x; C h and x B
        of_state,  # dy C
        # C B once for 8 heads, dy x, its product with B; C h and dy h.
        chunk * (128 // 8 + 64 + 128) + 2 * of_state,
        chunk * (128 // 8 + 64 + 128 + 64) + 2 * of_state,  # as many, and weights dy
    ]
    assert [cost.flops for cost in costs] == [2 * positions * n for n in per_position]
    assert [cost.transcendentals for cost in costs] == [positions * chunk * n for n in (1, 0, 1, 1)]
    x_bytes, B_bytes, numbers = positions * 64 * 2, 2 * 128 * 128 * 2, positions * 4
    first_and_last, between = 2 * 2 * 16 * of_state * 4, 2 * 16 * 2 * of_state * 2
    of_heads_bytes = 16 * 4 + 2 * 16 * 2 * 4  # D, and what is kept over each chunk
    expected = 2 * x_bytes + 2 * B_bytes + 4 * numbers + first_and_last + between + of_heads_bytes
    assert costs[0].bytes_accessed == expected
