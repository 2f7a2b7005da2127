"""The outputs of the HF implementation in tests/golden, and the native model with the same
weights."""

import json
import lzma
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.convert.hf_config import config_from_hf
from hymba_jax.convert.load_sharded import read_params
from hymba_jax.convert.mapping import hf_slices
from hymba_jax.model.abstract import abstract_model
from hymba_jax.parallel.mesh import make_mesh

GOLDEN = Path(__file__).parent / "golden"
CASES = ("tiny-ntk", "tiny-default-rope", "tiny-shared", "tiny-nometa", "tiny-wide")


@dataclass(frozen=True)
class Golden:
    """A golden model: what went in and what came out."""

    config: HymbaConfig
    weights: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    meta: dict

    @property
    def tokens(self) -> jax.Array:
        return jnp.asarray(self.arrays["input_ids"], jnp.int32)

    def model(self, **compute: Any) -> tuple[nnx.GraphDef, nnx.State]:
        """The model's structure, and the HF weights as its parameters."""
        chosen = ComputeConfig(**compute)
        graph, abstract = abstract_model(self.config, chosen, make_mesh(jax.devices()[:1]))
        params = read_params(
            lambda name, index: self.weights[name][index],
            abstract,
            self.config,
            scan_layers=chosen.scan_layers,
        )
        return nnx.split(nnx.merge(graph, params))


def to_hf(params: nnx.State, config: HymbaConfig, *, scan_layers: bool) -> dict[str, jax.Array]:
    """Parameters, or their gradients, as the tensors of an HF checkpoint."""
    flat = {path: leaf[...] for path, leaf in nnx.to_flat_state(params)}
    shapes = {path: array.shape for path, array in flat.items()}
    rows = defaultdict(list)
    for part in hf_slices(shapes, config, scan_layers=scan_layers):
        rows[part.name].append(part.to_hf(flat[part.path]))
    return {name: jnp.concatenate(arrays) for name, arrays in rows.items()}


def load(case: str) -> Golden:
    folder = GOLDEN / case
    packed = folder / "model.safetensors.xz"
    if packed.exists():
        weights = safetensors.numpy.load(lzma.decompress(packed.read_bytes()))
    else:
        weights = safetensors.numpy.load_file(folder / "model.safetensors")
    return Golden(
        config=config_from_hf(json.loads((folder / "config.json").read_text())),
        weights=weights,
        arrays=dict(np.load(folder / "golden.npz")),
        gradients=safetensors.numpy.load_file(folder / "grads.safetensors"),
        meta=json.loads((folder / "meta.json").read_text()),
    )
