"""Whether a training state can fit the memory of its devices, before any of it is allocated."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from hymba_jax.errors import HymbaError
from hymba_jax.host import host_memory
from hymba_jax.sharding import bytes_on_each
from hymba_jax.training.state import AbstractTrainState


def check_memory(abstract: AbstractTrainState, mesh: Mesh) -> None:
    """Refuses a state that is larger than all the memory that its devices have.

    Nothing else is refused: what gradients and activations take besides, the compiler says
    (`hymba compile`).

    Raises:
      HymbaError: naming both sizes and what to change.
    """
    needed = bytes_on_each(abstract.state)
    available = device_memory(mesh.local_devices)
    if available is None or needed <= available:
        return
    device = mesh.local_devices[0]
    change = "choose a smaller model, or compute.param_dtype bfloat16"
    share = ""
    if device.platform == "cpu":
        share = f", its share of {host_memory() / 1e9:,.1f} GB of host memory"
    else:
        change += ", or shard it over more devices by parallel.fsdp"
    raise HymbaError(
        f"{abstract.num_params:,} parameters and their optimizer state take {needed / 1e9:,.1f} GB "
        f"on each device, and a {device.device_kind} has {available / 1e9:,.1f} GB{share}: {change}"
    )


def device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that each of this process's devices has; None where it does not tell.

    A CPU's devices share the memory of the host.
    """
    if devices[0].platform == "cpu":
        return host_memory() // len(devices)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min((limit for limit in limits if limit), default=None)
