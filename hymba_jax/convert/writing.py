"""Arrays on their way to the disk, with processors and disk busy at the same time."""

import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_THREADS = min(4, os.cpu_count() or 1)  # each holds an array or two


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
    """Writes a contiguous array where the file stands, and has the disk begin with it."""
    assert array.flags.c_contiguous
    start, data = file.tell(), memoryview(array.reshape(-1).view(np.uint8))
    while data:
        data = data[file.write(data) :]
    # The kernel itself would wait until much has gathered, or until the end. Of what this call is
    # named for, leaving memory, nothing happens to pages that the disk does not have yet.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, array.nbytes, os.POSIX_FADV_DONTNEED)
