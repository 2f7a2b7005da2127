"""Ops whose kernels XLA cannot partition: each device runs them on its shards of the arrays."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from hymba_jax.parallel.mesh import is_partitioned, length_sharded_over, partition, sharded_over
from hymba_jax.types import Array

type Axes = tuple[str | None, ...]


def shard_map(
    function: Callable[..., Any],
    axes: Mapping[str, Axes],
    out_axes: Any,
    **arrays: Array | None,
) -> Any:
    """function(**arrays), with each device of the mesh in context computing its shard.

    The function must compute a shard along any logical axis from that shard of the arrays, from
    arrays without the axis, or from what it fetches from other devices. A result without an axis
    must be equal on all devices along it. Outside a mesh this is a plain call.

    Args:
      function: closes over no arrays.
      axes: the logical axes of each array.
      out_axes: those of each result, in a tree like the results'.
    """
    if not is_partitioned():
        return function(**arrays)
    mesh = jax.sharding.get_abstract_mesh()
    given = {name: array for name, array in arrays.items() if array is not None}
    sizes: dict[str, int] = {}  # of which an axis has several: query and key/value heads
    for name, array in given.items():
        for axis, size in zip(axes[name], array.shape, strict=True):
            if axis is not None:
                sizes[axis] = math.gcd(sizes.get(axis, 0), size)
    specs = {name: partition(axes[name], sizes, mesh) for name in given}
    out_specs = jax.tree.map(lambda a: partition(a, sizes, mesh), out_axes, is_leaf=_is_axes)
    one_each = PartitionSpec(mesh.axis_names)  # along a new first axis
    floats = {name for name in given if jnp.issubdtype(given[name].dtype, jnp.floating)}
    rest = dict.fromkeys(name for name in arrays if name not in given)

    def replicated_over(array: Axes) -> tuple[str, ...]:
        """The mesh axes that other arrays are sharded over, and this one is replicated over."""
        others = {axis: size for axis, size in sizes.items() if axis not in array}
        names = {n for axis, size in others.items() for n in sharded_over(axis, size, mesh)}
        return tuple(name for name in mesh.axis_names if name in names and mesh.shape[name] > 1)

    # JAX's own gradient of `shard_map` is summed over all devices with the same shard of an array,
    # even where they all computed the same gradient.
    @jax.custom_vjp
    def run(given: dict[str, Array]) -> Any:
        return _shard_map(lambda shards: function(**shards, **rest), (specs,), out_specs)(given)

    def forward(given: dict[str, Array]) -> tuple[Any, Any]:
        def of_shards(shards: dict[str, Array]) -> tuple[Any, Any]:
            fixed = rest | {name: shard for name, shard in shards.items() if name not in floats}
            outputs, vjp = jax.vjp(
                lambda shards: function(**shards, **fixed), {name: shards[name] for name in floats}
            )
            return outputs, jax.tree.map(lambda residual: residual[None], vjp)

        return _shard_map(of_shards, (specs,), (out_specs, one_each))(given)

    def backward(vjp: Any, cotangents: Any) -> tuple[dict[str, Array | None]]:
        def counted_once(result: Axes, cotangent: Array) -> Array:
            names = replicated_over(result)
            return jnp.where(lax.axis_index(names) == 0, cotangent, 0) if names else cotangent

        def of_shards(vjp: Any, cotangents: Any) -> dict[str, Array]:
            cotangents = jax.tree.map(counted_once, out_axes, cotangents, is_leaf=_is_axes)
            (gradients,) = jax.tree.map(lambda residual: residual[0], vjp)(cotangents)
            return {name: lax.psum(g, replicated_over(axes[name])) for name, g in gradients.items()}

        wanted = {name: specs[name] for name in floats}
        gradients = _shard_map(of_shards, (one_each, out_specs), wanted)(vjp, cotangents)
        return (dict.fromkeys(given) | gradients,)

    run.defvjp(forward, backward)
    return run(given)


def length_axis(length: int, *, at_least: int = 1) -> str | None:
    """The axis of the mesh in context that sequences of this length are sharded over, if any.

    Args:
      at_least: positions that an op needs in every shard; shorter sequences are replicated.
    """
    if not is_partitioned():
        return None
    return length_sharded_over(length, jax.sharding.get_abstract_mesh(), at_least=at_least)


def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
    """The axes of the mesh in context that a logical axis of this size is sharded over, if any."""
    if not is_partitioned():
        return ()
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in sharded_over(axis, size, mesh) if mesh.shape[name] > 1)


def shard_elements(array: Array, axes: Axes) -> int:
    """Elements of a device's shard of an array with these logical axes."""
    if not is_partitioned():
        return array.size
    shape = jax.sharding.get_abstract_mesh().shape
    sharded = (mesh_axes(a, size) for a, size in zip(axes, array.shape, strict=True) if a)
    return array.size // math.prod(shape[name] for names in sharded for name in names)


def _shard_map(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple) and all(a is None or isinstance(a, str) for a in value)
