"""Turns the metrics of each step into lines: on the display, in the files."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax

from hymba_jax.errors import HymbaError
from hymba_jax.training.config import TrainingConfig
from hymba_jax.training.display import Display, duration
from hymba_jax.training.metrics import MetricsWriter
from hymba_jax.training.optimizer import learning_rate_schedule
from hymba_jax.training.step import StepMetrics
from hymba_jax.training.utilisation import Workload

type Loss = Literal["input", "checkpoint"]
LOSSES: tuple[Loss, ...] = ("input", "checkpoint")
"""What devices may have to wait for."""


class Recorder:
    """Reads each step's metrics when the next step is already under way.

    So the device never waits for Python. `flush` reads the last ones at once.

    Args:
      workload: of a step, for the speed.
      start: updates done when the run begins or goes on.
    """

    def __init__(
        self,
        config: TrainingConfig,
        workload: Workload,
        start: int,
        writer: MetricsWriter,
        display: Display,
    ):
        self._config, self._writer, self._display = config, writer, display
        self._workload = workload
        self._learning_rate = learning_rate_schedule(config)
        self._pending: tuple[int, StepMetrics] | None = None
        self._bits_per_byte: float | None = None
        self._logged, self._logged_at = start, time.monotonic()
        self._lost = dict.fromkeys(LOSSES, 0.0)

    def submit(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of the step just begun; reads those of the step before."""
        self.flush()
        self._pending = step, metrics

    def flush(self, validation: dict[str, float] | None = None) -> None:
        """Reads and records the step last submitted, with what validation said after it.

        Raises:
          HymbaError: its loss or its gradient is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        learning_rate = float(self._learning_rate(step - 1))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise HymbaError(
                f"step {step}: the loss is {loss} and its gradient's norm {grad_norm}, at learning "
                f"rate {learning_rate:.2g}: look at the metrics of the steps before; a lower "
                "training.learning_rate, a longer warm-up or a lower training.clip_norm may help"
            )
        if validation:
            self._bits_per_byte = validation["validation_bits_per_byte"]
        seconds = (time.monotonic() - self._logged_at) / (step - self._logged)
        rates = self._workload.rates(seconds)
        line = self._line(step, loss, seconds, rates)
        self._display.update(line)
        if step % self._config.log_every == 0 or validation:
            (self._display.say if validation else self._display.log)(line)
            values = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
            values |= rates
            values |= {f"{what}_seconds": round(lost, 4) for what, lost in self._lost.items()}
            self._writer.write(step, {**values, **(validation or {})})
            self._logged, self._logged_at = step, time.monotonic()
            self._lost = dict.fromkeys(LOSSES, 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        jax.block_until_ready(self._pending)
        began = time.monotonic()
        yield
        self._logged_at += time.monotonic() - began

    @contextmanager
    def waiting_for(self, what: Loss) -> Iterator[None]:
        """Time spent inside is lost if the devices have nothing left to do at its end.

        The next line of metrics has it, as `input_seconds` or `checkpoint_seconds`. That is the
        most that it can be: the devices may have been busy at first.
        """
        began = time.monotonic()
        yield
        loss: Any = None if self._pending is None else self._pending[1].loss
        if loss is None or loss.is_ready():
            self._lost[what] += time.monotonic() - began

    def _line(self, step: int, loss: float, seconds: float, rates: dict[str, float]) -> str:
        """The line of progress, at this many seconds a step and the rates that follow."""
        steps = self._config.steps
        bits = "-" if self._bits_per_byte is None else f"{self._bits_per_byte:.4f}"
        used = f"{rates['mfu']:.1%} MFU  " if "mfu" in rates else ""
        return (
            f"step {step:{len(str(steps))}}/{steps}  loss {loss:.4f}  "
            f"validation {bits} bits/byte  {rates['tokens_per_second']:,.0f} tokens/s  "
            f"{used}{duration((steps - step) * seconds)} left"
        )
