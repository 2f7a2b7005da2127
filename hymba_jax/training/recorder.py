"""Prints and writes the metrics of training steps."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax

from hymba_jax.display import Display, duration
from hymba_jax.errors import HymbaError
from hymba_jax.training.loss import Average, Averages, add_averages, means
from hymba_jax.training.metrics import MetricsWriter
from hymba_jax.training.mfu import Workload
from hymba_jax.training.spikes import SpikeDetector
from hymba_jax.training.step import SKIPPED, Metrics

type Stall = Literal["input", "checkpoint"]
STALLS: tuple[Stall, ...] = ("input", "checkpoint")
"""Causes of stalls."""

_MOST_SKIPPED = 10  # updates in a row: the parameters are the same for all, so more data won't help


@dataclass(frozen=True)
class RecorderState:
    """What a checkpoint keeps of a recorder, as JSON: a resumed run writes the same lines.

    Attributes:
      step: the last that is recorded.
      logged: the last that has a line, so that the next line is about the steps after it.
      seconds: taken by those.
      averages: their sums and weights.
      latest: metrics of `step` that are not averaged.
      stalls: seconds, by cause.
      skipped: updates skipped since the start of the run.
      skipped_in_a_row: of them, those that led to `step`.
      losses: the last ones, for the spikes.
    """

    step: int = 0
    logged: int = 0
    seconds: float = 0.0
    averages: dict[str, Any] = field(default_factory=dict)
    latest: dict[str, int | float] = field(default_factory=dict)
    stalls: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STALLS, 0.0))
    skipped: int = 0
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)


class StageRecords(NamedTuple):
    """What metrics say of the steps of a stage, beside what these return.

    Attributes:
      name: empty if the run has no stages.
      start: steps of the run before its first.
      tokens_before: tokens of the run before them.
      workload: of a step, for the speed.
      data_progress: metrics of what has been read after a step, such as `epoch`.
      name_data: the data of a step, in words.
    """

    name: str
    start: int
    tokens_before: int
    workload: Workload
    data_progress: Callable[[int], Mapping[str, int | float]]
    name_data: Callable[[int], str]


class Recorder:
    """Reads a step's metrics once the next is under way, so that no device waits for Python.

    `flush` reads the last ones immediately.

    A line of metrics covers the steps since the line before: averages over them (`loss` per token,
    `grad_norm` per step), the last value of others (`learning_rate`), and the throughput.
    `tokens_seen`, what was read of the data and `skipped_steps` count from the start of the run;
    the averages are without the steps that were skipped. Those and loss spikes are printed with
    their data.

    `begin_stage` comes before the first step.

    Args:
      steps: of the whole run.
      log_every: steps between lines.
      state: of the checkpoint that a run resumes from.
    """

    def __init__(
        self,
        steps: int,
        log_every: int,
        writer: MetricsWriter,
        display: Display,
        state: RecorderState = RecorderState(),
    ):
        self._stage: StageRecords
        self._steps, self._log_every = steps, log_every
        self._writer, self._display = writer, display
        self._pending: tuple[int, Metrics] | None = None
        self._step, self._logged, self._seconds = state.step, state.logged, state.seconds
        self._averages = {name: Average(*pair) for name, pair in state.averages.items()}
        self._latest, self._stalls = dict(state.latest), dict(state.stalls)
        self._skipped, self._skipped_in_a_row = state.skipped, state.skipped_in_a_row
        self._spikes = SpikeDetector(state.losses)

    def begin_stage(self, stage: StageRecords) -> None:
        """The steps that are submitted from here on are of this stage."""
        self.flush()
        self._stage = stage
        self._logged_at = time.monotonic() - self._seconds

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

    def flush(self, validation: dict[str, float] | None = None) -> None:
        """Reads the step last submitted; writes a line with what validation said, or if it is due.

        Raises:
          HymbaError: its loss or its gradient is not finite, and was not skipped.
        """
        if not self._read() and validation is None:
            return
        values: dict[str, int | float | str] = {**means(self._averages), **self._latest}
        seconds = self._seconds / (self._step - self._logged)
        stage = self._stage
        rates = stage.workload.rates(seconds)
        line = self._line(means(self._averages).get("loss", math.nan), validation, seconds, rates)
        self._display.update(line)
        if self._step % self._log_every == 0 or validation:
            (self._display.say if validation else self._display.log)(line)
            if stage.name:
                values["stage"] = stage.name
            done = self._step - stage.start
            values["tokens_seen"] = stage.tokens_before + done * stage.workload.tokens
            values |= stage.data_progress(self._step)
            values |= rates
            values |= {f"{what}_seconds": round(stall, 4) for what, stall in self._stalls.items()}
            self._writer.write(self._step, {**values, **(validation or {})})
            self._begin_line()

    def state(self) -> RecorderState:
        """What a run resumes with after the step last submitted, which is read, but not written.

        Raises:
          HymbaError: as for `flush`.
        """
        self._read()
        return RecorderState(
            self._step,
            self._logged,
            self._seconds,
            self._averages,
            self._latest,
            self._stalls,
            self._skipped,
            self._skipped_in_a_row,
            self._spikes.losses,
        )

    def _read(self) -> bool:
        """Reads the step last submitted, if it has not been."""
        if self._pending is None:
            return False
        (self._step, submitted), self._pending = self._pending, None
        metrics = jax.tree.map(float, submitted)  # waits for the step
        self._seconds = time.monotonic() - self._logged_at
        averages = {name: value for name, value in metrics.items() if isinstance(value, Average)}
        others = {name: value for name, value in metrics.items() if name not in averages}
        is_skipped = others.pop(SKIPPED, None)
        if is_skipped:
            self._skip(averages)
        else:
            self._check_finite(averages, others)
            self._skipped_in_a_row = 0
            self._averages = add_averages([self._averages, averages])
            self._latest = others
            self._find_spike(averages["loss"].mean)
        if is_skipped is not None:
            self._latest["skipped_steps"] = self._skipped
        return True

    def _begin_line(self) -> None:
        """After the step last read, the steps of the next line begin."""
        self._logged, self._logged_at = self._step, self._logged_at + self._seconds
        self._seconds, self._averages = 0.0, {}
        self._stalls = dict.fromkeys(STALLS, 0.0)

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
        loss: float,
        validation: dict[str, float] | None,
        seconds: float,
        rates: dict[str, float],
    ) -> str:
        """The line of progress, at this many seconds a step and the rates that follow."""
        steps = self._steps
        bits = ""
        if validation:
            bits = f"validation {validation['validation_bits_per_byte']:.4f} bits/byte  "
        used = f"{rates['mfu']:.1%} MFU  " if "mfu" in rates else ""
        stage = f"{self._stage.name}  " if self._stage.name else ""
        return (
            f"{stage}step {self._step:{len(str(steps))}}/{steps}  loss {loss:.4f}  "
            f"{bits}{rates['tokens_per_second']:,.0f} tokens/s  {used}"
            f"{duration((steps - self._step) * seconds)} left"
        )

    def _find_spike(self, loss: float) -> None:
        """Prints the step if its loss is far above those before."""
        median = self._spikes.add(loss)
        if median is not None:
            self._display.say(
                f"step {self._step}: loss spike, {loss:.4f} after a median of {median:.4f}: "
                f"{self._stage.name_data(self._step)}"
            )

    def _skip(self, averages: Averages) -> None:
        """Counts and prints a step whose update was skipped.

        Raises:
          HymbaError: there were too many in a row.
        """
        self._skipped += 1
        self._skipped_in_a_row += 1
        what = f"step {self._step}: {_loss_and_norm(averages)}: {self._stage.name_data(self._step)}"
        if self._skipped_in_a_row == _MOST_SKIPPED:
            raise HymbaError(
                f"{what}: updates were skipped {_MOST_SKIPPED} times in a row: check the data and "
                "the metrics of earlier steps"
            )
        self._display.say(f"{what}: update skipped")

    def _check_finite(self, averages: Averages, others: dict[str, float]) -> None:
        """Raises HymbaError if the loss of the step or its gradient is not finite."""
        found = means({name: averages[name] for name in ("loss", "grad_norm")})
        if not all(math.isfinite(found.get(name, math.nan)) for name in ("loss", "grad_norm")):
            rate = others.get("learning_rate")
            at = "" if rate is None else f", at learning rate {rate:.2g}"
            raise HymbaError(
                f"step {self._step}: {_loss_and_norm(averages)}{at}: "
                f"{self._stage.name_data(self._step)}: check the data and the metrics of earlier "
                "steps; a lower training.learning_rate, a longer warm-up or a lower "
                'training.clip_norm may help, and training.on_nonfinite "skip" skips such updates'
            )


def _loss_and_norm(averages: Averages) -> str:
    found = means({name: averages[name] for name in ("loss", "grad_norm")})
    loss, grad_norm = found.get("loss", math.nan), found.get("grad_norm", math.nan)
    return f"the loss is {loss} and its gradient's norm {grad_norm}"
