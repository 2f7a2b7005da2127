"""An HF checkpoint onto 8 devices: each reads its own shards, and no more."""

import math

import jax
import numpy as np
import pytest
from convert.hf import golden_weights, write_hf
from flax import nnx

from hymba_jax.config import ComputeConfig
from hymba_jax.convert.hf_checkpoint import HFCheckpoint
from hymba_jax.convert.load_sharded import load_hf
from hymba_jax.convert.mapping import EMBEDDING, HEAD
from hymba_jax.errors import HymbaError
from hymba_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("load_sharded") / "hf")


@pytest.fixture
def read_bytes(monkeypatch):
    """Bytes of everything that is read of tensors."""
    counts = []
    read = HFCheckpoint.read

    def count(self, name, index=()):
        part = read(self, name, index)
        counts.append(part.nbytes)
        return part

    monkeypatch.setattr(HFCheckpoint, "read", count)
    return counts


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_is_its_rows_of_a_tensor(hf, scan_layers):
    """Layers 3 and 4, the second of two equal pairs that share keys and values."""
    model = load_hf(hf, ComputeConfig(scan_layers=scan_layers), make_mesh(jax.devices()[:8]))
    blocks = model.groups[1].group.blocks if scan_layers else model.groups[2].blocks
    weights = golden_weights()

    def check(param, expected):
        array = np.asarray(param[...])
        np.testing.assert_array_equal(array[1] if scan_layers else array, expected)

    for layer, block in zip((3, 4), blocks, strict=True):
        tensors = {
            name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in weights.items()
        }
        attention, ssm = block.mixer.attention, block.mixer.ssm
        kv = {attention.key_proj: 16, attention.value_proj: 32} if layer == 3 else {}
        num_rows = {attention.query_proj: 48, **kv, ssm.in_proj: 96, ssm.gate_proj: 96}
        ends = np.cumsum([*num_rows.values()])
        rows = np.split(tensors["mamba.in_proj.weight"], ends[:-1])
        for linear, part in zip(num_rows, rows, strict=True):
            check(linear.kernel, part.T)
        check(ssm.conv_kernel, tensors["mamba.conv1d.weight"][:, 0].T)
        check(ssm.dt_bias, tensors["mamba.dt_proj.0.bias"])
        check(ssm.A_log, tensors["mamba.A_log.0"].T)
        check(block.mlp.down_proj.kernel, tensors["moe.experts.0.down_proj.weight"].T)
        check(block.mixer_norm.scale, tensors["input_layernorm.weight"])
    np.testing.assert_array_equal(model.meta_tokens[...], weights["model.memory_tokens"])


def test_each_device_holds_its_shard(hf):
    """6 of 48 rows of a kernel, which are columns of the HF tensor; all of a vector."""
    mesh = make_mesh(jax.devices()[:8])
    block = load_hf(hf, ComputeConfig(scan_layers=False), mesh).groups[0].blocks[0]
    kernel = golden_weights()["model.layers.0.moe.experts.0.up_proj.weight"].T
    bias = golden_weights()["model.layers.0.mamba.conv1d.bias"]
    for param, shards in (
        (block.mlp.up_proj.kernel, np.split(kernel, 8)),
        (block.mixer.ssm.conv_bias, [bias] * 8),
    ):
        held = {shard.device: shard.data for shard in param[...].addressable_shards}
        for device, expected in zip(mesh.devices.flat, shards, strict=True):
            np.testing.assert_array_equal(held[device], expected)


def test_all_devices_together_read_the_file_once(hf, read_bytes):
    """Replicated parameters, too."""
    load_hf(hf, ComputeConfig(), make_mesh(jax.devices()[:8]))
    assert sum(read_bytes) == sum(array.nbytes for array in golden_weights().values())


def test_a_process_reads_what_its_devices_hold(hf, read_bytes, monkeypatch):
    """As if all but two of the devices belonged to other processes."""
    make_array = jax.make_array_from_callback

    def ask_for_two(shape, sharding, read_part):
        indices = sharding.devices_indices_map(shape)
        for device in [*indices][: 1 if sharding.is_fully_replicated else 2]:
            read_part(indices[device])
        asked.append(sum(read_bytes))
        return make_array(shape, sharding, lambda index: np.zeros(shape, np.float32)[index])

    asked = []
    monkeypatch.setattr(jax, "make_array_from_callback", ask_for_two)
    mesh = make_mesh(jax.devices()[:8])
    params = nnx.state(load_hf(hf, ComputeConfig(), mesh))
    held = 0
    for _, leaf in nnx.to_flat_state(params):
        shard = math.prod(leaf[...].sharding.shard_shape(leaf.shape)) * 4
        held += shard * (1 if leaf[...].sharding.is_fully_replicated else 2)
    assert asked[-1] == held
    assert held < 0.6 * sum(array.nbytes for array in golden_weights().values())


def test_parameters_are_cast_to_what_the_model_stores(hf):
    compute = ComputeConfig(dtype="bfloat16", param_dtype="bfloat16")
    model = load_hf(hf, compute, make_mesh(jax.devices()[:1]))
    assert model.embedding[...].dtype == "bfloat16"
    np.testing.assert_array_equal(
        model.embedding[...].astype("float32"),
        golden_weights()[EMBEDDING].astype("bfloat16").astype("float32"),
    )


def test_a_tied_copy_has_to_be_equal_on_a_mesh_too(tmp_path):
    weights = golden_weights()
    weights[HEAD] = weights[EMBEDDING].copy()
    same = write_hf(tmp_path / "same", weights)
    load_hf(same, ComputeConfig(), make_mesh(jax.devices()[:8]))
    weights[HEAD][5, 5] += 1
    other = write_hf(tmp_path / "other", weights)
    with pytest.raises(HymbaError, match="differs from"):
        load_hf(other, ComputeConfig(), make_mesh(jax.devices()[:8]))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    hf = write_hf(tmp_path / "hf", intermediate_size=50)
    with pytest.raises(HymbaError, match=r"weights and config\.json do not fit"):
        load_hf(hf, ComputeConfig(), make_mesh(jax.devices()[:1]))
