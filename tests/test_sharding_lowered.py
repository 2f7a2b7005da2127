"""Training steps lowered ahead of time for meshes of accelerators, no device needed."""

import re

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from hymba_jax.checkpoint.train_state import abstract_train_state
from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data.batch import abstract_batch
from hymba_jax.parallel.mesh import batch_sharding
from hymba_jax.training.loss import make_loss_fn, next_token_loss
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import make_train_step

BATCH, LENGTH, META_TOKENS, HIDDEN, HEAD_DIM = 8, 256, 16, 256, 64
MODEL = HymbaConfig(
    vocab_size=512,
    hidden_size=HIDDEN,
    mlp_size=512,
    layers="2*W",
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=128, rope_type="default"),
    num_meta_tokens=META_TOKENS,
)
AXES = ("data", "fsdp", "sequence", "tensor")
# Of data 2 x fsdp 2 x tensor 2: rows, SSM channels, and heads of queries and keys.
ROWS, CHANNELS, HEADS, KV_HEADS = 2, 256, 2, 1
TRITON = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
GPU_CHUNK = 64  # that the kernel for GPUs fills fewer positions up to


def lower(platform, dtype, axes=("data", "fsdp", "tensor")):
    """The training step as 8 devices of a platform are given it, 2 along each of these axes."""
    kind = {"tpu": "TPU v6 lite", "gpu": "NVIDIA H100"}.get(platform, "any")
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    sizes = [2 if axis in axes else 1 for axis in AXES]
    mesh = AbstractMesh(tuple(sizes), AXES, (AxisType.Auto,) * 4, abstract_device=device)
    optimizer = make_optimizer(TrainingConfig())
    compute = ComputeConfig(dtype=dtype)
    batch = abstract_batch(BATCH, LENGTH, batch_sharding(mesh))
    with use_abstract_mesh(mesh):
        abstract = abstract_train_state(MODEL, compute, optimizer, mesh)
        loss_fn = make_loss_fn(next_token_loss, abstract.graph)
        step = jax.jit(make_train_step(loss_fn, optimizer, micro_batch_size=BATCH))
        traced = step.trace(abstract.state, batch)
        name = {"gpu": "cuda"}.get(platform, platform)
        return traced.lower(lowering_platforms=(name,)).as_text()


def calls(text, target):
    """Shapes of the arrays that each call of a kernel is given."""
    for types in re.findall(rf"custom_call @{target}.* : \((.*)\) ->", text):
        yield [tuple(map(int, re.findall(r"\d+(?=x)", array))) for array in types.split(", ")]


def scans(given, rows, positions):
    return [shapes for shapes in given if shapes[0] == (rows, positions, CHANNELS)]


def attention(given, rows, queries, keys):
    """With queries and keys as they are filled up to blocks of 128."""
    wanted = [(rows, HEADS * HEAD_DIM, queries), (rows, KV_HEADS * HEAD_DIM, keys)]
    return [shapes for shapes in given if shapes[2:4] == wanted]


def attention_kernels(given, rows, queries, keys):
    """With queries and keys as they are filled up to blocks of 128."""
    wanted = [(rows, queries, HEADS, HEAD_DIM), (rows, keys, KV_HEADS, HEAD_DIM)]
    return [shapes for shapes in given if shapes[:2] == wanted]


def assert_kinds(given, *kinds):
    """These kinds of calls and no others."""
    assert all(kinds)
    assert sum(map(len, kinds)) == len(given)


@pytest.mark.slow  # with the length sharded, too: below
def test_every_tpu_runs_the_kernels_on_its_shard():
    """The meta tokens' are on all devices."""
    given = [*calls(lower("tpu", "bfloat16"), "tpu_custom_call")]
    tokens = scans(given, ROWS, LENGTH), attention(given, ROWS, LENGTH, 384)
    assert_kinds(given, *tokens, scans(given, 1, META_TOKENS), attention(given, 1, 128, 128))


@TRITON
def test_every_gpu_runs_the_kernels_on_its_shard():
    """The meta tokens' are on all devices."""
    given = [*calls(lower("gpu", "bfloat16"), "mosaic_gpu_v2")]
    tokens = scans(given, ROWS, LENGTH), attention_kernels(given, ROWS, LENGTH, 384)
    meta = scans(given, 1, GPU_CHUNK), attention_kernels(given, 1, 128, 128)
    assert_kinds(given, *tokens, *meta)


def test_every_tpu_runs_the_kernels_on_its_shard_of_the_length():
    """Meta tokens, a window and its own part are met; the meta tokens' own pass is sharded, too."""
    given = [*calls(lower("tpu", "bfloat16", ("fsdp", "sequence", "tensor")), "tpu_custom_call")]
    rows, length = 2 * ROWS, LENGTH // 2
    tokens = scans(given, rows, length), attention(given, rows, length, 384)
    assert_kinds(given, *tokens, scans(given, 1, META_TOKENS // 2), attention(given, 1, 128, 128))


@TRITON
@pytest.mark.slow
def test_every_gpu_runs_the_kernels_on_its_shard_of_the_length():
    """Meta tokens, a window and its own part are met."""
    given = [*calls(lower("gpu", "bfloat16", ("fsdp", "sequence", "tensor")), "mosaic_gpu_v2")]
    rows, length = 2 * ROWS, LENGTH // 2
    tokens = scans(given, rows, length), attention_kernels(given, rows, length, 384)
    meta = scans(given, 1, GPU_CHUNK), attention_kernels(given, 1, 128, 128)
    assert_kinds(given, *tokens, *meta)
