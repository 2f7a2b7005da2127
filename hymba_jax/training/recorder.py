"""Prints and writes the metrics of training steps."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax

from hymba_jax.config.training import TrainingConfig
from hymba_jax.display import Display, duration
from hymba_jax.errors import HymbaError
from hymba_jax.training.loss import Average, Averages, add_averages, means
from hymba_jax.training.metrics import MetricsWriter
from hymba_jax.training.mfu import Workload
from hymba_jax.training.step import Metrics

type Stall = Literal["input", "checkpoint"]
STALLS: tuple[Stall, ...] = ("input", "checkpoint")
"""Causes of stalls."""


class Recorder:
    """Reads a step's metrics once the next is under way, so that no device waits for Python.

    `flush` reads the last ones immediately.

    A line of metrics covers the steps since the line before: averages over them (`loss` per token,
    `grad_norm` per step), the last value of others (`learning_rate`), and the throughput.
    `tokens_seen` and `epoch` count from the start of the run.

    Args:
      workload: of a step, for the speed.
      steps_per_epoch: that read each training window once; need not be whole.
      start: updates done when the run starts or resumes.
    """

    def __init__(
        self,
        config: TrainingConfig,
        workload: Workload,
        steps_per_epoch: float,
        start: int,
        writer: MetricsWriter,
        display: Display,
    ):
        self._config, self._writer, self._display = config, writer, display
        self._workload, self._steps_per_epoch = workload, steps_per_epoch
        self._pending: tuple[int, Metrics] | None = None
        self._begin_line(start, time.monotonic())

    def _begin_line(self, step: int, now: float) -> None:
        """After this step, and at this time, the steps of the next line begin."""
        self._logged, self._logged_at = step, now
        self._averages: Averages = {}
        self._stalls = dict.fromkeys(STALLS, 0.0)

    def submit(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of the step just begun; reads those of the step before."""
        self.flush()
        self._pending = step, metrics

    def collect(self) -> None:
        """Reads the step last submitted if it is complete, before the next begins.

        On synchronous back ends the next step would be included in its time.
        """
        if self._is_idle():
            self.flush()

    def flush(self, validation: dict[str, float] | None = None, *, log: bool = False) -> None:
        """Reads and records the step last submitted, with what validation said after it.

        Args:
          log: writes a line, as every `log_every` steps and after a validation.

        Raises:
          HymbaError: its loss or its gradient is not finite.
        """
        if self._pending is None:
            return
        (step, submitted), self._pending = self._pending, None
        metrics = jax.tree.map(float, submitted)  # waits for the step
        now = time.monotonic()
        _check_finite(step, metrics)
        averages = {name: value for name, value in metrics.items() if isinstance(value, Average)}
        self._averages = add_averages([self._averages, averages])
        values = means(self._averages)
        values |= {name: value for name, value in metrics.items() if name not in averages}
        seconds = (now - self._logged_at) / (step - self._logged)
        rates = self._workload.rates(seconds)
        line = self._line(step, values["loss"], validation, seconds, rates)
        self._display.update(line)
        if step % self._config.log_every == 0 or validation or log:
            (self._display.say if validation else self._display.log)(line)
            values["tokens_seen"] = step * self._workload.tokens
            values["epoch"] = round(step / self._steps_per_epoch, 4)
            values |= rates
            values |= {f"{what}_seconds": round(stall, 4) for what, stall in self._stalls.items()}
            self._writer.write(step, {**values, **(validation or {})})
            if validation or log:
                self._writer.flush()
            self._begin_line(step, now)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside from the throughput."""
        jax.block_until_ready(self._pending)
        began = time.monotonic()
        yield
        self._logged_at += time.monotonic() - began

    @contextmanager
    def waiting_for(self, what: Stall) -> Iterator[None]:
        """Records the time spent inside as a stall if the devices are idle at its end.

        The next line of metrics has it as `input_seconds` or `checkpoint_seconds`. It is an upper
        bound: the devices may have been busy at first.
        """
        began = time.monotonic()
        yield
        if self._is_idle():
            self._stalls[what] += time.monotonic() - began

    def _is_idle(self) -> bool:
        """Whether the devices have done all steps submitted."""
        if self._pending is None:
            return True
        loss: Any = self._pending[1]["loss"]
        return bool(loss.total.is_ready())

    def _line(
        self,
        step: int,
        loss: float,
        validation: dict[str, float] | None,
        seconds: float,
        rates: dict[str, float],
    ) -> str:
        """The line of progress, at this many seconds a step and the rates that follow."""
        steps = self._config.steps
        bits = ""
        if validation:
            bits = f"validation {validation['validation_bits_per_byte']:.4f} bits/byte  "
        used = f"{rates['mfu']:.1%} MFU  " if "mfu" in rates else ""
        return (
            f"step {step:{len(str(steps))}}/{steps}  loss {loss:.4f}  "
            f"{bits}{rates['tokens_per_second']:,.0f} tokens/s  {used}"
            f"{duration((steps - step) * seconds)} left"
        )


def _check_finite(step: int, metrics: dict[str, Any]) -> None:
    """Raises HymbaError if the loss of a step or its gradient is not finite."""
    averages = means({name: metrics[name] for name in ("loss", "grad_norm")})
    loss, grad_norm = averages.get("loss", math.nan), averages["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        rate = metrics.get("learning_rate")
        at = "" if rate is None else f", at learning rate {rate:.2g}"
        raise HymbaError(
            f"step {step}: the loss is {loss} and its gradient's norm {grad_norm}{at}: check "
            "the metrics of earlier steps; a lower training.learning_rate, a longer warm-up "
            "or a lower training.clip_norm may help"
        )
