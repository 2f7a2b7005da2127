"""How long, how fast and how often a run trains."""

from collections.abc import Iterator
from dataclasses import dataclass

from hymba_jax.errors import HymbaError


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer, the schedule, and when to look and save.

    Attributes:
      steps: updates of the whole run.
      batch_size: sequences an update sees.
      accumulate: pieces that a batch is computed in, one after another, to save memory.
      learning_rate: of the constant stage.
      min_learning_rate: of the last update.
      warmup_fraction: part of the steps in which the rate rises linearly.
      decay_fraction: part of the steps, at the end, in which it falls linearly.
      weight_decay: of matrices, times the learning rate.
      beta1: decay of the mean of the gradients.
      beta2: decay of the mean of their squares.
      clip_norm: the gradient is scaled down to this norm where it is longer.
      log_every: steps between lines of metrics.
      validate_every: steps between validations.
      validation_batches: batches of held-out text in each; the last validation reads all of it.
      checkpoint_every: steps between checkpoints; the last step has one too.
      keep_checkpoints: checkpoints kept, newest first.
      sample_prompt: what the text written at the end of the run continues.
      sample_tokens: its length; 0 writes none.
      sample_temperature: 0 takes the likeliest token each time, 1 the model's distribution.

    Raises:
      HymbaError: naming every value that cannot be.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-3
    min_learning_rate: float = 1e-5
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    log_every: int = 10
    validate_every: int = 250
    validation_batches: int = 16
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    sample_prompt: str = "def "
    sample_tokens: int = 128
    sample_temperature: float = 0.8

    def __post_init__(self) -> None:
        problems = [*self._problems()]
        if problems:
            raise HymbaError("training config: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        for name in (
            *("steps", "batch_size", "accumulate", "log_every", "validate_every"),
            *("validation_batches", "checkpoint_every", "keep_checkpoints"),
        ):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}, not at least 1"
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                yield f"{name} is {getattr(self, name)}, not above 0"
        for name in ("weight_decay", "sample_tokens", "sample_temperature"):
            if not 0 <= getattr(self, name) < float("inf"):
                yield f"{name} is {getattr(self, name)}, not at least 0"
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}, not in [0, 1)"
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            yield (
                f"min_learning_rate is {self.min_learning_rate}, "
                f"not between 0 and learning_rate {self.learning_rate}"
            )
        warmup, decay = self.warmup_fraction, self.decay_fraction
        if not (warmup >= 0 and decay >= 0 and warmup + decay <= 1):
            yield (
                f"warmup_fraction {warmup} and decay_fraction {decay} are not parts of a whole run"
            )
        if self.accumulate > 0 and self.batch_size % self.accumulate:
            yield f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"

    @property
    def micro_batch_size(self) -> int:
        """Sequences computed at once."""
        return self.batch_size // self.accumulate

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup_fraction * self.steps)

    @property
    def decay_steps(self) -> int:
        return min(round(self.decay_fraction * self.steps), self.steps - self.warmup_steps)
