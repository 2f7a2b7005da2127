"""The platform that is traced for, by which an op chooses its implementation."""

import jax


def device_kind() -> str:
    """What JAX calls the device that is traced for, such as `TPU v4`."""
    target = jax.sharding.get_abstract_mesh().abstract_device
    kind: str = (jax.devices()[0] if target is None else target).device_kind
    return kind


def target_platform() -> str:
    """`cpu`, `tpu`, `gpu` (Hopper), `older gpu` (without its asynchronous copies) or `newer gpu`
    (without its matrix instructions).

    That of the mesh in context (`jax.set_mesh`), which may be an ahead-of-time target, else of this
    process's devices.
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if target is None else target.platform
    if platform == jax.default_backend() == "gpu":
        generation = int(float(jax.devices()[0].compute_capability))
        return "gpu" if generation == 9 else "older gpu" if generation < 9 else "newer gpu"
    return platform
