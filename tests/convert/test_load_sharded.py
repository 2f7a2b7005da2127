"""An HF checkpoint onto 8 devices: each reads its own shards, and no more."""

import math

import jax
import numpy as np
import pytest
from convert.hf import golden_weights, write_hf
from flax import nnx
from golden_cases import load

from hymba_jax.config import ComputeConfig
from hymba_jax.convert.hf_checkpoint import HFCheckpoint
from hymba_jax.convert.load_sharded import load_hf
from hymba_jax.convert.mapping import EMBEDDING, HEAD
from hymba_jax.errors import HymbaError
from hymba_jax.model.sharding import state_shardings
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
@pytest.mark.parametrize("num_devices", [1, 8])
def test_every_parameter_is_where_and_what_it_should_be(hf, scan_layers, num_devices):
    mesh = make_mesh(jax.devices()[:num_devices])
    compute = ComputeConfig(scan_layers=scan_layers)
    params = nnx.state(load_hf(hf, compute, mesh))
    _, expected = load("tiny-shared").model(scan_layers=scan_layers)
    shardings = dict(nnx.to_flat_state(state_shardings(params, load("tiny-shared").config, mesh)))
    expected = dict(nnx.to_flat_state(expected))
    for path, leaf in nnx.to_flat_state(params):
        assert leaf[...].sharding == shardings[path]
        np.testing.assert_array_equal(leaf[...], expected[path][...])


def test_all_devices_together_read_the_file_once(hf, read_bytes):
    """But for what is on each of them whole, which is read once too."""
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
