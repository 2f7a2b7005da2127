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
from hymba_jax.parallel.slowest import SlowestProcess
from hymba_jax.training.loss import Average, Averages, add_averages, means
from hymba_jax.training.metrics import MetricsWriter
from hymba_jax.training.mfu import Workload
from hymba_jax.training.spikes import SpikeDetector
from hymba_jax.training.step import PADDING, SKIPPED, Metrics

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
      bits_per_byte, validation_loss: of the last validation, as far as it had them.
      padding: positions of padding since the start of the run.
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
    bits_per_byte: float | None = None
    validation_loss: float | None = None
    padding: int = 0


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
    `tokens_seen`, what was read of the data and `skipped_steps` count from the start of the run.
    `tokens_seen` and tokens per second are without padding, `mfu` is with it. The averages are
    without the steps that were skipped. Those and loss spikes are printed with their data. Of
    several processes, lines at every `log_every` steps name the slowest: the one that spent most
    time on a step, `slowest_process_seconds`, besides waiting for its devices.

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
        self._padding = state.padding
        self._spikes = SpikeDetector(state.losses)
        self._bits_per_byte, self._validation_loss = state.bits_per_byte, state.validation_loss
        self._slowest = SlowestProcess()

    def begin_stage(self, stage: StageRecords) -> None:
        """The steps that are submitted from here on are of this stage."""
        self.flush()
        self._stage = stage
        now = time.monotonic()
        self._logged_at = now - self._seconds
        self._compared, self._compared_at, self._waited = self._step, now, 0.0

    def forget_losses(self) -> None:
        """Forgets earlier losses, of training and validation: later ones do not compare."""
        self._spikes = SpikeDetector()
        self._bits_per_byte = self._validation_loss = None

    def submit(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of the step just begun; reads those of the step before."""
        self.flush()
        self._pending = step, metrics
        if step % self._log_every == 0:
            self._compare_processes(step)

    def collect(self) -> None:
        """Reads the step last submitted if it is complete, before the next begins.

        On synchronous back ends the next step would be included in its time.
        """
        if self._is_idle():
            self.flush()

    def flush(self, evaluated: Mapping[str, int | float] | None = None) -> None:
        """Reads the step last submitted; writes a line if it is due.

        Args:
          evaluated: what evaluations after the step said, which a line is always due for.

        Raises:
          HymbaError: its loss or its gradient is not finite, and was not skipped.
        """
        if not self._read() and not evaluated:
            return
        stage, evaluated = self._stage, evaluated or {}
        self._bits_per_byte = evaluated.get("validation_bits_per_byte", self._bits_per_byte)
        self._validation_loss = evaluated.get("validation_loss", self._validation_loss)
        values = means(self._averages) | self._latest
        seconds = self._seconds / (self._step - self._logged)
        values |= stage.workload.rates(seconds, values.get(PADDING, 0.0))
        if slowest := self._slowest.read():
            values["slowest_process"], values["slowest_process_seconds"] = slowest
        line = self._line(values)
        self._display.update(line)
        if self._step % self._log_every == 0 or evaluated:
            (self._display.say if evaluated else self._display.log)(line)
            done = self._step - stage.start
            positions = stage.tokens_before + done * stage.workload.tokens
            values["tokens_seen"] = positions - self._padding
            values |= stage.data_progress(self._step)
            values |= {f"{what}_seconds": round(stall, 4) for what, stall in self._stalls.items()}
            name = {"stage": stage.name} if stage.name else {}
            self._writer.write(self._step, {**name, **values, **evaluated})
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
            self._bits_per_byte,
            self._validation_loss,
            self._padding,
        )

    def _read(self) -> bool:
        """Reads the step last submitted, if it has not been."""
        if self._pending is None:
            return False
        (self._step, submitted), self._pending = self._pending, None
        with self._waiting():
            metrics = jax.tree.map(float, submitted)
        self._seconds = time.monotonic() - self._logged_at
        averages = {name: value for name, value in metrics.items() if isinstance(value, Average)}
        others = {name: value for name, value in metrics.items() if name not in averages}
        if padding := averages.get(PADDING):
            self._padding += int(padding.total)
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

    def _compare_processes(self, step: int) -> None:
        """Gives the time that this process took for the steps since it did so before."""
        now = time.monotonic()
        own = now - self._compared_at - self._waited
        self._slowest.submit(own / (step - self._compared))
        self._compared, self._compared_at, self._waited = step, now, 0.0

    def _begin_line(self) -> None:
        """After the step last read, the steps of the next line begin."""
        self._logged, self._logged_at = self._step, self._logged_at + self._seconds
        self._seconds, self._averages = 0.0, {}
        self._stalls = dict.fromkeys(STALLS, 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside from the throughput."""
        with self._waiting():
            jax.block_until_ready(self._pending)
        began = time.monotonic()
        yield
        pause = time.monotonic() - began
        self._logged_at += pause
        self._compared_at += pause

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

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Records the time spent inside as waiting for the devices."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def _is_idle(self) -> bool:
        """Whether the devices have done all steps submitted."""
        if self._pending is None:
            return True
        loss: Any = self._pending[1]["loss"]
        return bool(loss.total.is_ready())

    def _line(self, values: Mapping[str, int | float]) -> str:
        """The line of progress, with the last validation: in bits per byte, if there is text.

        What matters least is last, where a terminal of 100 columns may cut it off.
        """
        step, steps = self._step, self._steps
        seconds = self._seconds / (step - self._logged)
        stalled = self._stalls["input"] / self._seconds
        parts = [self._stage.name, f"step {step:{len(str(steps))}}/{steps} {step / steps:4.0%}"]
        parts.append(f"loss {values.get('loss', math.nan):.4f}")
        if self._bits_per_byte is not None:
            parts.append(f"val {self._bits_per_byte:.4f} bpb")
        elif self._validation_loss is not None:
            parts.append(f"val loss {self._validation_loss:.4f}")
        if "reward_accuracy" in values:
            parts.append(f"accuracy {values['reward_accuracy']:.0%}")
            parts.append(f"margin {values['reward_margin']:.3f}")
        parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
        if "mfu" in values:
            parts.append(f"{values['mfu']:.0%} MFU")
        parts.append(f"{duration((steps - step) * seconds)} left")
        if stalled >= 0.005:
            parts.append(f"{stalled:.0%} input stalls")
        if "slowest_process" in values:
            seconds = values["slowest_process_seconds"]
            parts.append(f"slowest process {values['slowest_process']} {seconds:.2f} s")
        return "  ".join(filter(None, parts))

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
