"""Arrays on their way to the disk, with processors and disk busy at the same time."""

import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_THREADS = 8  # each holds an array or two, and most wait for the disk


def in_threads[*T](call: Callable[[*T], None], *items: Iterable[object]) -> None:
    """Calls with each item, or with one of each of several `items`, in several threads.

    Raises what a call raised. However it ends, no call goes on afterwards, so that what they wrote
    can be removed.
    """
    threads = ThreadPoolExecutor(_THREADS)
    try:
        for _ in threads.map(call, *items):
            pass
    finally:
        threads.shutdown(cancel_futures=True)


def write_bytes(file: io.FileIO, array: np.ndarray) -> None:
    """Writes a contiguous array where the file stands, and waits until the disk has it.

    The kernel is to keep no copy: else a checkpoint would fill the memory, which takes longer than
    the disk where a virtual machine's host has to provide it first.
    """
    assert array.flags.c_contiguous
    start, data = file.tell(), memoryview(array.reshape(-1).view(np.uint8))
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, array.nbytes, os.POSIX_FADV_DONTNEED)
