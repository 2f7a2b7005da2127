"""Optimizer, schedule, and how often to log, validate and save."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hymba_jax.config.field_types import Bounds, bound_problems, type_problems
from hymba_jax.errors import HymbaError

_COUNT = Bounds(1, 2**31 - 1, "the optimizer counts steps in 32 bits")
_ROWS = Bounds(1, 2**20, "no host holds the tokens of so many sequences")
_RATE = Bounds(1e-30, 1e30, "float32 cannot multiply by it", "float32 cannot multiply by it")
_DECAY = Bounds(0, 1 - 2**-24, "float32 makes 1 of it")

TRAINING_BOUNDS = {
    "steps": _COUNT,
    "batch_size": _ROWS,
    "gradient_accumulation_steps": _ROWS,
    "learning_rate": _RATE,
    "min_learning_rate": _RATE._replace(at_least=0),
    "warmup_fraction": Bounds(0, 1, "it is a fraction of the steps"),
    "decay_fraction": Bounds(0, 1, "it is a fraction of the steps"),
    "weight_decay": _RATE._replace(at_least=0),
    "beta1": _DECAY,
    "beta2": _DECAY,
    "clip_norm": _RATE,
    "log_every": _COUNT,
    "validate_every": _COUNT,
    "validation_batches": _COUNT,
    "checkpoint_every": _COUNT,
    "keep_checkpoints": _COUNT,
    "sample_tokens": Bounds(0, 2**23, "no model has so many positions"),
    "sample_temperature": Bounds(0, 1e30, "float32 cannot divide by it"),
}


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer, the schedule, and how often to log, validate and save.

    Attributes:
      steps: number of optimizer updates.
      batch_size: sequences per update.
      gradient_accumulation_steps: micro-batches that a batch is computed in, one after another, to
        save memory.
      learning_rate: of the constant phase.
      min_learning_rate: learning rate of the last update.
      warmup_fraction: fraction of the steps in which the rate rises linearly.
      decay_fraction: fraction of the steps, at the end, in which it falls linearly.
      weight_decay: of AdamW, multiplied by the learning rate; applied to matrices only.
      beta1: decay of AdamW's first moment.
      beta2: decay of AdamW's second moment.
      clip_norm: maximum norm of the gradient, which is scaled down to it.
      on_nonfinite: what to do if the loss or the gradient is not finite: stop, or skip the update,
        which leaves parameters, optimizer and schedule as they were.
      log_every: steps between lines of metrics; a validation adds one.
      validate_every: steps between validations.
      validation_batches: batches of `batch_size` sequences per validation; the last validation uses
        all held-out text.
      checkpoint_every: steps between checkpoints; the last step has one too.
      keep_checkpoints: checkpoints kept, newest first.
      keep_best: keeps the checkpoint with the lowest validation loss, too; a validation that is the
        best so far saves one. It is the mean over all validation sets, of the same batches each
        time.
      sample_prompt: prompt of the sample that is written at the end of the run.
      sample_tokens: its length; 0 writes none.
      sample_temperature: 0 takes the likeliest token each time, 1 the model's distribution.

    Raises:
      HymbaError: naming every invalid value.
    """

    steps: int = 1000
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-3
    min_learning_rate: float = 1e-5
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    log_every: int = 10
    validate_every: int = 250
    validation_batches: int = 16
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    keep_best: bool = True
    sample_prompt: str = "def "
    sample_tokens: int = 128
    sample_temperature: float = 0.8

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._problems()]
        if problems:
            raise HymbaError("training config: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        yield from bound_problems(self, TRAINING_BOUNDS)
        if 0 < self.sample_temperature < 1e-30:
            yield f"sample_temperature is {self.sample_temperature}: float32 cannot divide by it"
        if self.min_learning_rate > self.learning_rate:
            yield (
                f"min_learning_rate {self.min_learning_rate} is above "
                f"learning_rate {self.learning_rate}"
            )
        warmup, decay = self.warmup_fraction, self.decay_fraction
        if warmup + decay > 1:
            yield (f"warmup_fraction {warmup} and decay_fraction {decay} add up to more than 1")
        accumulation = self.gradient_accumulation_steps
        if accumulation > 0 and self.batch_size % accumulation:
            yield (
                f"batch_size {self.batch_size} is not a multiple of "
                f"gradient_accumulation_steps {accumulation}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Sequences computed at once."""
        return self.batch_size // self.gradient_accumulation_steps

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup_fraction * self.steps)

    @property
    def decay_steps(self) -> int:
        return min(round(self.decay_fraction * self.steps), self.steps - self.warmup_steps)
