"""A clock for the scripts that run in a Python with torch, which need not have hymba_jax."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):  # the first two warm up
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])
