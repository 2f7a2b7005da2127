"""How the process holds on to its memory."""

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Keeps what is freed for what comes next, instead of giving it back to the kernel.

    XLA:CPU allocates a step's temporaries anew in each step. Given back and mapped again, every
    page of them is zeroed and faulted in each time: a training step of `configs/tiny.toml` took
    545 ms so and takes 481 ms (`benchmarks/train_step.py`). Call it before JAX starts its threads;
    where the C library isn't glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # only the main arena can grow to any size without mapping
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
