"""The outputs of the released PyTorch code in tests/golden, and our model with the same weights."""

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.convert.mapping import from_released
from hymba_jax.convert.released_config import config_from_released
from hymba_jax.model import Hymba

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

    def model(self, **compute: object) -> tuple[nnx.GraphDef, nnx.State]:
        """Our model's structure, and the released weights as its parameters."""
        chosen = ComputeConfig(**compute)
        abstract = nnx.eval_shape(lambda: Hymba(self.config, chosen, nnx.Rngs(0)))
        graph, params = nnx.split(abstract)
        scan_layers = chosen.scan_layers
        return graph, from_released(self.weights, params, self.config, scan_layers=scan_layers)


def load(case: str) -> Golden:
    folder = GOLDEN / case
    packed = folder / "model.safetensors.xz"
    if packed.exists():
        weights = safetensors.numpy.load(lzma.decompress(packed.read_bytes()))
    else:
        weights = safetensors.numpy.load_file(folder / "model.safetensors")
    return Golden(
        config=config_from_released(json.loads((folder / "config.json").read_text())),
        weights=weights,
        arrays=dict(np.load(folder / "golden.npz")),
        gradients=safetensors.numpy.load_file(folder / "grads.safetensors"),
        meta=json.loads((folder / "meta.json").read_text()),
    )
