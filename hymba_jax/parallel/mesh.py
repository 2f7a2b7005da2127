"""The one table from logical axes to the axes of a device mesh.

Models name logical axes and nothing else: those of a parameter in its metadata `axes`, those of
activations in `constrain`. One rule holds for all arrays: an axis whose size the mesh does not
divide is replicated. Heads are counted in key/value heads, so that every device has complete
groups.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils
from jax.lax import with_sharding_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.types import Array

type AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or an abstract mesh to lower programs for."""

MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "hidden": ("fsdp",),  # of stored parameters; see `gather`
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "channels": ("tensor",),
    "heads": ("tensor",),
    "ssm_heads": ("tensor",),
    "B_C": ("tensor",),
}


def make_mesh(
    devices: Sequence[jax.Device] | None = None, parallel: ParallelConfig | None = None
) -> Mesh:
    """A mesh of these devices, or of all there are, ordered by their interconnect topology.

    Raises:
      HymbaError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (parallel or ParallelConfig()).sizes(len(devices))
    # On a torus a mesh axis is made of physical axes, or of a part of one if necessary.
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
    """Replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Rows of a batch sharded over the devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


def batch_shards(mesh: AnyMesh) -> int:
    """Number of shards of a batch."""
    return axis_product(MESH_AXES["batch"], mesh)


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold, possibly along with other processes."""
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


def shard_first_axis(x: Array) -> Array:
    """The same array, sharded over all devices of the mesh in context along its first axis.

    That axis is padded with zeros to a multiple of the devices.
    """
    if not is_partitioned():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    x = jnp.pad(x, [(0, -len(x) % mesh.size), *[(0, 0)] * (x.ndim - 1)])
    # Without it XLA shards what x is computed from over `data`, too, and then replicates all of it.
    x = with_sharding_constraint(
        x, PartitionSpec(None, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
    )
    return with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def gather_param(param: nnx.Param[Array], dtype: DTypeLike | None = None) -> Array:
    """A parameter as layers compute with it: in their dtype, and gathered along `hidden`."""
    value = param[...] if dtype is None else param[...].astype(dtype)
    return _gather_param(value, param.get_metadata("axes"))


def gather(value: Array, axes: tuple[str, ...]) -> Array:
    """A parameter with these logical axes, its shards along `hidden` gathered.

    To be called just before use, so that only the parameters in use are gathered.
    """
    return _constrain_hidden(value, axes, is_sharded=False)


def scatter(gradient: Array, axes: tuple[str, ...]) -> Array:
    """The gradient of a gathered parameter, reduce-scattered."""
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
    # Embedding lookups lie along the batch, and XLA would sum their gradients in shards of
    # `hidden`. With a `tensor` axis it warns of "involuntary full rematerialization" and may
    # replicate all activations for that. There the sum is unsharded, as for a kernel; elsewhere
    # sharding it takes fewer collective bytes.
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        gradient = gather(gradient, axes)
    return (scatter(gradient, axes),)


_gather_param.defvjp(_gather_param_forward, _gather_param_backward)


def axis_product(names: Sequence[str], mesh: AnyMesh) -> int:
    """The number of devices along these mesh axes together."""
    return math.prod(mesh.shape[name] for name in names)
