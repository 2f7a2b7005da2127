"""How a model's parameters are sharded over a mesh, by the logical axes that they name."""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from hymba_jax.config import HymbaConfig
from hymba_jax.parallel.mesh import (
    MESH_AXES,
    AnyMesh,
    axis_product,
    batch_shards,
    partition,
    replicated,
    sharded_over,
)


def axis_sizes(config: HymbaConfig) -> dict[str, int]:
    """Size of each logical axis, which its mesh axes have to divide."""
    widths = [config.mixer_channels(spec) for spec in config.layer_specs]
    mamba2: dict[str, int] = {}
    if any(spec.ssm == "mamba2" for spec in config.layer_specs):
        widths.append(config.channels // config.ssm.groups)  # normed by group
        mamba2 = {
            "ssm_heads": config.ssm_heads,
            "B_C": 2 * config.ssm.groups * config.ssm.state_size,
        }
    return {
        "hidden": config.hidden_size,
        "vocab": config.num_embeddings,
        "mlp": config.mlp_size,
        "channels": math.gcd(config.channels, *widths),
        "heads": config.attention.num_kv_heads,
        **mamba2,
    }


def describe_sharding(config: HymbaConfig, mesh: AnyMesh, length: int) -> str:
    """What is sharded over a mesh and what is replicated, in words.

    Args:
      length: tokens of a sequence.
    """
    sharded, replicated_axes = [f"batch over {batch_shards(mesh)}"], []
    for axis, size in {"length": length, **axis_sizes(config)}.items():
        shards = axis_product(MESH_AXES[axis], mesh)
        if not sharded_over(axis, size, mesh):
            count = f"{size} key/value heads" if axis == "heads" else f"{axis} {size}"
            replicated_axes.append(f"{count} by {shards}")
        elif shards > 1:
            sharded.append(f"{axis} over {shards}")
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    rest = (
        f"; replicated, as not divisible: {', '.join(replicated_axes)}" if replicated_axes else ""
    )
    return f"{mesh.size} devices, {sizes}; sharded: {', '.join(sharded)}{rest}"


def state_shardings(state: Any, config: HymbaConfig, mesh: AnyMesh) -> Any:
    """A sharding for each parameter, or each optimizer moment, of a tree of them.

    Args:
      state: any tree; NNX variables are placed by their `axes`, all else is replicated.
      config: of the model that they belong to.
    """
    sizes = axis_sizes(config)

    def place(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nnx.Variable):
            return replicated(mesh)
        axes = leaf.get_metadata("axes")
        stacked = len(leaf.get_raw_value().shape) - len(axes)  # stacked layers come first
        return NamedSharding(mesh, partition([*[None] * stacked, *axes], sizes, mesh))

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
