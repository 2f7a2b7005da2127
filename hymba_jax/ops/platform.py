"""What a function is traced for, by which an op chooses its implementation."""

import jax
from jax.sharding import AxisType


def target_platform() -> str:
    """`cpu`, `tpu`, `gpu` or `older gpu` (before Hopper, without its asynchronous copies).

    That of the mesh in context (`jax.set_mesh`), which may be compiled for from elsewhere, or else
    of this process's devices.
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if target is None else target.platform
    if platform == jax.default_backend() == "gpu":
        capability = float(jax.devices()[0].compute_capability)
        return "gpu" if capability >= 9 else "older gpu"
    return platform


def is_partitioned() -> bool:
    """Whether XLA will split the program over the mesh in context, which it cannot do to a kernel.

    Inside `jax.shard_map` over all of its axes it will not: each device has a program of its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != AxisType.Manual for size, kind in axes)
