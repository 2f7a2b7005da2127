"""Memory allocation and vector width of the host, where JAX runs on the CPU."""

import contextlib
import ctypes
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

# glibc's malloc.h and Linux's mman.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2**21
# Of containers; "max" where there is none.
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_MEMINFO, _STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
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
    """Bytes of memory that this process may have: the host's, or its cgroup's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            memory = min(memory, int(Path(path).read_text()))
    return memory


def available_memory() -> int:
    """Bytes of `host_memory` that other programs leave, where Linux says so.

    What this process holds counts as available, as it may reuse it. Of a cgroup only the limit is
    known, not what other programs in it use.
    """
    memory = host_memory()
    with contextlib.suppress(OSError):  # another system
        resident = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                memory = min(memory, int(line.split()[1]) * 1024 + resident)
    return memory


def _keep_freed_memory() -> None:
    """Keeps freed memory in the process instead of returning it to the kernel.

    XLA:CPU allocates a step's temporaries anew in every step. If they were returned, every page
    would be zeroed and faulted in again, a sixth of a training step of `configs/tiny.toml`
    (`benchmarks/train_step.py`, with and without `--no-prepare`). glibc only.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)  # only the main arena can grow to any size without mapping
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        _use_huge_pages(libc)


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Asks for huge pages for all memory that will be allocated.

    Weights and caches are read in each step, for which fewer addresses need be translated.
    """
    libc.malloc.restype = ctypes.c_void_p
    size = host_memory() // 2  # Linux refuses more than it has
    # Addresses without memory behind them, which are freed again, but stay the process's.
    start = libc.malloc(ctypes.c_size_t(size))
    if start is None:  # not allowed to have as many
        return
    aligned = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    length = (start + size - aligned) // _HUGE_PAGE * _HUGE_PAGE
    libc.madvise(ctypes.c_void_p(aligned), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(start))


def _use_widest_vectors() -> None:
    """512 bits where the CPU has them; XLA's default is 256.

    XLA aborts on unknown flags, so it is set only for releases that were tested.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if version("jaxlib").startswith("0.12.") and _VECTOR_WIDTH not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_VECTOR_WIDTH}=512"
