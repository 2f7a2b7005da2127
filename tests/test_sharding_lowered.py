"""Training steps lowered for meshes of accelerators that need not be there."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig
from hymba_jax.sharding import batch_sharding
from hymba_jax.training.config import TrainingConfig
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.state import make_template
from hymba_jax.training.step import make_train_step

BATCH, LENGTH, META_TOKENS, HIDDEN, HEAD_DIM = 8, 240, 16, 256, 64
MODEL = HymbaConfig(
    vocab_size=512,
    hidden_size=HIDDEN,
    mlp_size=512,
    layers="Ww",
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=128, rope_type="default"),
    num_meta_tokens=META_TOKENS,
)
# Of data 2 x fsdp 2 x tensor 2: rows, positions, SSM channels, and heads of queries and keys.
ROWS, POSITIONS, CHANNELS, HEADS, KV_HEADS = 2, 256, 256, 2, 1


def lower(platform, dtype):
    """The training step as 8 devices of a platform are given it."""
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    axes = ("data", "fsdp", "tensor")
    mesh = AbstractMesh((2, 2, 2), axes, (AxisType.Auto,) * 3, abstract_device=device)
    optimizer, compute = make_optimizer(TrainingConfig()), ComputeConfig(dtype=dtype)
    rows = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=batch_sharding(mesh))
    with use_abstract_mesh(mesh):
        template = make_template(MODEL, compute, optimizer, mesh)
        step = jax.jit(make_train_step(template.graph, optimizer, micro_batch_size=BATCH))
        traced = step.trace(template.state, {"inputs": rows, "targets": rows})
        name = {"gpu": "cuda"}.get(platform, platform)
        return traced.lower(lowering_platforms=(name,)).as_text()


def calls(text, target):
    """Shapes of the arrays that each call of a kernel is given."""
    for types in re.findall(rf"custom_call @{target}.* : \((.*)\) ->", text):
        yield [tuple(map(int, re.findall(r"\d+(?=x)", array))) for array in types.split(", ")]


def test_every_tpu_runs_the_kernels_on_its_part():
    given = [*calls(lower("tpu", "bfloat16"), "tpu_custom_call")]
    scans = [shapes for shapes in given if shapes[0] == (ROWS, POSITIONS, CHANNELS)]
    query, key = (ROWS, HEADS, POSITIONS, HEAD_DIM), (ROWS, KV_HEADS, POSITIONS, HEAD_DIM)
    splash = [shapes for shapes in given if shapes[2:4] == [query, key]]
    assert scans
    assert splash
    assert len(scans) + len(splash) == len(given)


def test_every_gpu_runs_the_scan_on_its_part():
    """In float32, as cuDNN cannot be asked without devices; see tests/ops/test_by_device.py."""
    scans = [*calls(lower("gpu", "float32"), "mosaic_gpu_v2")]
    assert scans
    assert all(shapes[0] == (ROWS, POSITIONS, CHANNELS) for shapes in scans)
