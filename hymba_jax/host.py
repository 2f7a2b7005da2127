"""Memory allocation and vector width of the host, where JAX runs on the CPU."""

import contextlib
import ctypes
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1
# Of containers; "max" where there is none.
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_VECTOR_WIDTH = "--xla_cpu_prefer_vector_width"


def prepare_host() -> None:
    """Keeps freed memory and enables the widest vectors, unless JAX has an accelerator.

    Call it before JAX starts its threads. With an accelerator, the host's threads would contend for
    the single arena.
    """
    if not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")):
        _keep_freed_memory()
        _use_widest_vectors()


def host_memory() -> int:
    """Bytes of memory available to this process: the host's, or its cgroup's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            memory = min(memory, int(Path(path).read_text()))
    return memory


def _keep_freed_memory() -> None:
    """Keeps freed memory in the process instead of returning it to the kernel.

    XLA:CPU allocates a step's temporaries anew in every step. If they were returned, every page
    would be zeroed and faulted in again, a sixth of a training step of `configs/tiny.toml`
    (`benchmarks/train_step.py`, with and without `--no-prepare`). glibc only.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # only the main arena can grow to any size without mapping
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def _use_widest_vectors() -> None:
    """512 bits where the CPU has them; XLA's default is 256.

    XLA aborts on unknown flags, so it is set only for releases that were tested.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if version("jaxlib").startswith("0.12.") and _VECTOR_WIDTH not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_VECTOR_WIDTH}=512"
