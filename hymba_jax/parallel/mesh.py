"""The one table from logical axes to the axes of a device mesh.

Models name logical axes and nothing else: those of a parameter in its metadata `axes`, those of
activations in `constrain`. One rule holds for all arrays: an axis that the mesh does not divide
is replicated on every device. Heads are counted in key/value heads, so that a device has whole
groups of them.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.lax import with_sharding_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.types import Array

type AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or what is known of one that programs are lowered for from elsewhere."""

MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "hidden": ("fsdp",),  # of parameters as they are kept; see `gather`
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "channels": ("tensor",),
    "heads": ("tensor",),
}


def make_mesh(
    devices: Sequence[jax.Device] | None = None, parallel: ParallelConfig | None = None
) -> Mesh:
    """A mesh of these devices, or of all there are, in an order that suits how they are linked.

    Raises:
      HymbaError: so many devices cannot be arranged so.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (parallel or ParallelConfig()).sizes(len(devices))
    # On a torus a mesh axis is a physical axis, or several; part of one if it has to be.
    arranged = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(arranged, tuple(sizes))


def sharded_over(axis: str, size: int, mesh: AnyMesh) -> tuple[str, ...]:
    """The mesh axes that an axis of this size is sharded over: all of the table's, or none."""
    names = tuple(name for name in MESH_AXES[axis] if name in mesh.shape)
    return () if size % axis_product(names, mesh) else names


def length_sharded_over(length: int, mesh: AnyMesh, *, at_least: int = 1) -> str | None:
    """The mesh axis that a length is sharded over, if in shards of at least so many positions."""
    names = sharded_over("length", length, mesh)
    shards = axis_product(names, mesh)
    return names[0] if shards > 1 and length // shards >= at_least else None


def partition(axes: Sequence[str | None], sizes: Mapping[str, int], mesh: AnyMesh) -> PartitionSpec:
    """The sharding of an array by its logical axes; an axis without a size is replicated."""

    def names(axis: str | None) -> tuple[str, ...] | None:
        if axis is None or axis not in sizes:
            return None
        return sharded_over(axis, sizes[axis], mesh) or None

    return PartitionSpec(*map(names, axes))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Rows of a batch sharded over the devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


def batch_shards(mesh: AnyMesh) -> int:
    """How many shards of equal size a batch has to have."""
    return axis_product(MESH_AXES["batch"], mesh)


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold, whoever else holds them, too."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    shards = [index[0] for index in indices if index is not None]
    return sorted({row for shard in shards for row in range(batch_size)[shard]})


def global_batch(rows: Any, mesh: Mesh, batch_size: int) -> Any:
    """A batch sharded over the devices, of which each process gives its `process_rows`."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda local: jax.make_array_from_process_local_data(
            sharding, local, (batch_size, *local.shape[1:])
        ),
        rows,
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes on each device of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def is_partitioned() -> bool:
    """Whether XLA will partition the program over the mesh in context (`jax.set_mesh`).

    Inside `jax.shard_map` over all of its axes it will not: each device has a program of its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != AxisType.Manual for size, kind in axes)


def constrain(x: Array, *axes: str | None) -> Array:
    """The same array, sharded over the mesh in context along these logical axes and no others."""
    if not is_partitioned():
        return x
    sizes = {axis: size for axis, size in zip(axes, x.shape, strict=True) if axis}
    return with_sharding_constraint(x, partition(axes, sizes, jax.sharding.get_abstract_mesh()))


def gather_param(param: nnx.Param[Array], dtype: DTypeLike | None = None) -> Array:
    """A parameter as layers compute with it: in their dtype, and gathered along `hidden`."""
    value = param[...] if dtype is None else param[...].astype(dtype)
    return _gather_param(value, param.get_metadata("axes"))


def gather(value: Array, axes: tuple[str, ...]) -> Array:
    """A parameter with these logical axes, its shards along `hidden` gathered.

    This is for just before it is used: a device holds no more gathered than it works on.
    """
    return _constrain_hidden(value, axes, is_sharded=False)


def scatter(gradient: Array, axes: tuple[str, ...]) -> Array:
    """The gradient of what was gathered, of which each device sums no more than its shard."""
    return _constrain_hidden(gradient, axes, is_sharded=True)


def _constrain_hidden(value: Array, axes: tuple[str, ...], *, is_sharded: bool) -> Array:
    if not is_partitioned() or "hidden" not in axes:
        return value
    i, mesh = axes.index("hidden"), jax.sharding.get_abstract_mesh()
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * len(axes)
    spec[i] = sharded_over("hidden", value.shape[i], mesh) or None if is_sharded else None
    return with_sharding_constraint(value, PartitionSpec(*spec))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_param(value: Array, axes: tuple[str, ...]) -> Array:
    return gather(value, axes)


def _gather_param_forward(value: Array, axes: tuple[str, ...]) -> tuple[Array, None]:
    return gather(value, axes), None


def _gather_param_backward(axes: tuple[str, ...], _: None, gradient: Array) -> tuple[Array]:
    # What is looked up in a table lies along the batch, and XLA would sum its gradients in shards
    # of `hidden`. On a mesh that has `tensor`, too, it considers replicating all activations for
    # that, with a warning of "involuntary full rematerialization". There the sum is whole, as for
    # a kernel; elsewhere shards of it take fewer bytes of collectives.
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        gradient = gather(gradient, axes)
    return (scatter(gradient, axes),)


_gather_param.defvjp(_gather_param_forward, _gather_param_backward)


def axis_product(names: Sequence[str], mesh: AnyMesh) -> int:
    """The number of devices along these mesh axes together."""
    return math.prod(mesh.shape[name] for name in names)
