"""Device memory, and checks before allocation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hymba_jax.display import format_bytes
from hymba_jax.errors import HymbaError
from hymba_jax.host import host_memory


def device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes of memory of each of this process's devices; None if unknown.

    A CPU's devices share the memory of the host.
    """
    if devices[0].platform == "cpu":
        return host_memory() // len(devices)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min((limit for limit in limits if limit), default=None)


def check_fits(what: str, size: int, devices: Sequence[jax.Device], advice: str) -> None:
    """Refuses an allocation larger than the memory of its devices.

    Smaller ones may still fail: other arrays and temporaries are not counted.

    Args:
      what: the subject of the message.
      size: bytes, of all devices together.

    Raises:
      HymbaError: it does not fit.
    """
    own = [device for device in devices if device.process_index == jax.process_index()]
    of_each = device_memory(own)
    total = None if of_each is None else of_each * len(devices)
    if total is not None and size > total:
        available = f"{own[0].device_kind} has {format_bytes(total)} of memory"
        raise HymbaError(f"{what}: {format_bytes(size)}, and {available}: {advice}")


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, or of what they would be."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
