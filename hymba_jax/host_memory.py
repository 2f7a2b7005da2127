"""How the process holds on to its memory where JAX computes on the CPU."""

import ctypes
import importlib.util

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Keeps what is freed for what comes next, instead of giving it back to the kernel.

    XLA:CPU allocates a step's temporaries anew in each step. Given back and mapped again, every
    page of them is zeroed and faulted in each time: a training step of `configs/tiny.toml` took
    767 ms so and takes 636 ms (`benchmarks/train_step.py`).

    Call it before JAX starts its threads. It does nothing where the C library isn't glibc, or
    where JAX has an accelerator, whose host threads would only wait for one another's memory.
    """
    accelerated = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not accelerated:
        mallopt(_M_ARENA_MAX, 1)  # only the main arena can grow to any size without mapping
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
