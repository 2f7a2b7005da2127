"""Progress and summary of a conversion."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from hymba_jax.convert.arrays import count_not_finite
from hymba_jax.display import Display, duration, format_bytes

_SHOW_EVERY = 0.1  # seconds


@dataclass
class Report:
    """What happens to the tensors of one conversion.

    Attributes:
      display: shows it.
      total: bytes that there are to convert.
    """

    display: Display
    total: int
    done: int = 0
    dtypes: Counter[tuple[str, str]] = field(default_factory=Counter)
    not_finite: Counter[str] = field(default_factory=Counter)
    start: float = field(default_factory=time.perf_counter)
    _shown: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def converted(self, name: str, before: np.ndarray, after: np.ndarray) -> None:
        """Counts an array of the HF tensor `name` that was converted; from any thread."""
        not_finite = count_not_finite(after)
        with self._lock:
            self.dtypes[str(before.dtype), str(after.dtype)] += after.size
            if not_finite:
                self.not_finite[name] += not_finite
            self.done += before.nbytes
            now = time.perf_counter()
            if now - self._shown > _SHOW_EVERY:
                self._shown = now
                self._show(now - self.start)

    def _show(self, seconds: float) -> None:
        left = duration(seconds * (self.total / self.done - 1))
        self.display.update(f"{format_bytes(self.done)} of {format_bytes(self.total)}, {left} left")

    def finish(self) -> None:
        """Prints the summary."""
        seconds = time.perf_counter() - self.start
        self.display.say(
            f"{format_bytes(self.done)} in {seconds:.1f} s, {format_bytes(self.done / seconds)}/s"
        )
        for (before, after), count in self.dtypes.items():
            change = before if before == after else f"cast from {before} to {after}, as requested"
            self.display.say(f"{count:,} numbers in {change}")
        for name, count in self.not_finite.items():
            self.display.say(f"warning: {name} has {count:,} numbers that are NaN or infinite")
