"""Optimizer, schedule, and how often to log, validate and save."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hymba_jax.config.field_types import Bounds, bound_problems, type_problems
from hymba_jax.errors import HymbaError

OptimizerName = Literal["adamw", "muon"]

_COUNT = Bounds(1, 2**31 - 1, "the optimizer counts steps in 32 bits")
_ROWS = Bounds(1, 2**20, "no host holds the tokens of so many sequences")
_RATE = Bounds(1e-30, 1e30, "float32 cannot multiply by it", "float32 cannot multiply by it")
_DECAY = Bounds(0, 1 - 2**-24, "float32 makes 1 of it")

type ObjectiveName = Literal["next_token", "dpo", "distill"]
type Schedule = Literal["wsd", "constant", "linear", "cosine"]

WARMUP_FRACTION, DECAY_FRACTION = 0.02, 0.2
"""Of a schedule that says nothing else."""

TRAINING_BOUNDS = {
    "steps": _COUNT,
    "batch_size": _ROWS,
    "gradient_accumulation_steps": _ROWS,
    "reduction_shards": _ROWS._replace(at_least=0),
    "learning_rate": _RATE,
    "min_learning_rate": _RATE._replace(at_least=0),
    "warmup_fraction": Bounds(0, 1, "it is a fraction of the steps"),
    "warmup_steps": _COUNT._replace(at_least=0),
    "decay_fraction": Bounds(0, 1, "it is a fraction of the steps"),
    "decay_steps": _COUNT._replace(at_least=0),
    "weight_decay": _RATE._replace(at_least=0),
    "beta1": _DECAY,
    "beta2": _DECAY,
    "muon_momentum": _DECAY,
    "muon_update_rms": _RATE,
    "ema_decay": _DECAY,
    "clip_norm": _RATE,
    "z_loss": _RATE._replace(at_least=0),
    "log_every": _COUNT,
    "validate_every": _COUNT,
    "validation_sequences": _COUNT,
    "checkpoint_every": _COUNT,
    "keep_checkpoints": _COUNT,
    "sample_tokens": Bounds(0, 2**23, "no model has so many positions"),
    "sample_temperature": Bounds(0, 1e30, "float32 cannot divide by it"),
}


# Options of one optimizer alone.
OPTIMIZER_OPTIONS: dict[OptimizerName, tuple[str, ...]] = {
    "muon": ("muon_momentum", "muon_update_rms"),
}


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer, the schedule, and how often to log, validate and save.

    Attributes:
      objective: what is minimized: `next_token`, the cross entropy of text and of answers;
        `dpo`, preference optimization on data of format `preference`, with the options `[dpo]`; or
        `distill`, next-token prediction with a teacher, with the options `[distill]`.
      steps: number of optimizer updates.
      batch_size: sequences per update.
      gradient_accumulation_steps: micro-batches that a batch is computed in, one after another, to
        save memory.
      reduction_shards: 0 adds up a batch in whatever order is fastest on the devices. Otherwise it
        is computed in so many equal shards, each on one device, which are added in a fixed order:
        losses and parameters have the same bits on any number of devices of a kind that divides it,
        in a mesh with `data` alone. Each device then holds the whole state.
      optimizer: "adamw" (arXiv 1711.05101), or "muon" (Jordan, 2024): Muon for the kernels inside
        the model, and AdamW for embedding, output head, norms and vectors.
      schedule: of the learning rate after the warm-up: `constant`; `linear` or `cosine`, which fall
        to min_learning_rate; or `wsd` (warmup, stable, decay), which is constant and at the end
        falls linearly.
      learning_rate: the largest, at the end of the warm-up.
      min_learning_rate: learning rate of the last update, unless the schedule is `constant`.
      warmup_fraction: fraction of the steps in which the rate rises linearly; 0.02 unless this or
        `warmup_steps` is set.
      warmup_steps: the same as a number of steps.
      decay_fraction: of `wsd`, fraction of the steps, at the end, in which it falls; 0.2 unless
        this or `decay_steps` is set.
      decay_steps: the same as a number of steps.
      weight_decay: multiplied by the learning rate; applied to matrices only.
      beta1: decay of AdamW's first moment.
      beta2: decay of AdamW's second moment.
      muon_momentum: decay of Muon's momentum.
      muon_update_rms: root mean square of Muon's update of a kernel, times the learning rate; 0.2
        is about that of AdamW (arXiv 2502.16982).
      ema_decay: decay, per update, of the moving average of the parameters that
        `hymba export --average ema` writes; 0 keeps none.
      clip_norm: maximum norm of the gradient, which is scaled down to it.
      z_loss: weight of the squared logarithm of softmax's denominator in the training loss (1e-4 in
        PaLM, arXiv 2204.02311), which keeps logits from growing; validation leaves it out.
      on_nonfinite: what to do if the loss or the gradient is not finite: stop, or skip the update,
        which leaves parameters, optimizer and schedule as they were.
      log_every: steps between lines of metrics; a validation adds one.
      validate_every: steps between validations.
      validate_on: the sources of validation that these use, by name; if there are none, all.
      validation_sequences: sequences of each validation set per validation; the last validation
        uses all held-out text.
      checkpoint_every: steps between checkpoints; the last step has one too.
      keep_checkpoints: checkpoints kept, newest first, of those that are due by `checkpoint_every`
        or end a stage; the newest of all, which an interruption may have saved, stays anyway.
      keep_best: keeps the checkpoint with the lowest validation loss, too; a validation that is the
        best so far saves one. It is the mean over all validation sets, of the same sequences each
        time. In a stage with another sequence length, objective or `validate_on`, and in each DPO
        stage with a reference, it starts from scratch.
      freeze: name patterns, as in `[adapter]`, of parameters that are not trained: embedding or
        mixer.ssm, for example. Frozen parameters have neither gradients nor optimizer state.
      sample_prompt: prompt of the sample that is written at the end of the run.
      sample_tokens: its length; 0 writes none.
      sample_temperature: 0 takes the likeliest token each time, 1 the model's distribution.

    Raises:
      HymbaError: naming every invalid value.
    """

    objective: ObjectiveName = "next_token"
    steps: int = 1000
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    reduction_shards: int = 0
    optimizer: OptimizerName = "adamw"
    schedule: Schedule = "wsd"
    learning_rate: float = 3e-3
    min_learning_rate: float = 1e-5
    warmup_fraction: float | None = None
    warmup_steps: int | None = None
    decay_fraction: float | None = None
    decay_steps: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    muon_momentum: float = 0.95
    muon_update_rms: float = 0.2
    ema_decay: float = 0.0
    clip_norm: float = 1.0
    z_loss: float = 0.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    log_every: int = 10
    validate_every: int = 250
    validate_on: tuple[str, ...] = ()
    validation_sequences: int = 128
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    keep_best: bool = True
    freeze: tuple[str, ...] = ()
    sample_prompt: str = "def "
    sample_tokens: int = 128
    sample_temperature: float = 0.8

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._problems()]
        if problems:
            raise HymbaError("training config: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        out_of_bounds = [*bound_problems(self, TRAINING_BOUNDS)]
        yield from out_of_bounds
        if 0 < self.sample_temperature < 1e-30:
            yield f"sample_temperature is {self.sample_temperature}: float32 cannot divide by it"
        if self.schedule != "constant" and self.min_learning_rate > self.learning_rate:
            yield (
                f"min_learning_rate {self.min_learning_rate} is above "
                f"learning_rate {self.learning_rate}"
            )
        if not out_of_bounds:
            yield from self._schedule_problems()
        for optimizer, names in OPTIMIZER_OPTIONS.items():
            for name in names:
                value = getattr(self, name)
                if self.optimizer != optimizer and value != getattr(TrainingConfig, name):
                    yield f"{name} is {value}, and optimizer {self.optimizer} does not use it"
        if self.z_loss and self.objective != "next_token":
            yield f"z_loss is {self.z_loss}, and objective {self.objective} does not use it"
        accumulation = self.gradient_accumulation_steps
        if accumulation > 0 and self.batch_size % accumulation:
            yield (
                f"batch_size {self.batch_size} is not a multiple of "
                f"gradient_accumulation_steps {accumulation}"
            )
        shards = self.reduction_shards
        if shards > 0 and self.batch_size % shards:
            yield f"batch_size {self.batch_size} is not a multiple of reduction_shards {shards}"
        if shards > 0 and accumulation != 1:
            yield (
                f"gradient_accumulation_steps is {accumulation}, and reduction_shards computes a "
                "batch shard by shard itself: set one of them"
            )

    def _schedule_problems(self) -> Iterator[str]:
        for phase in ("warmup", "decay"):
            if None not in (getattr(self, f"{phase}_fraction"), getattr(self, f"{phase}_steps")):
                yield f"{phase}_fraction and {phase}_steps are both set: set one of them"
        if self.schedule != "wsd" and (self.decay_fraction, self.decay_steps) != (None, None):
            yield f"decay_fraction and decay_steps are of schedule wsd, not of {self.schedule}"
        fractions = _given(self.warmup_fraction, 0), _given(self.decay_fraction, 0)
        if sum(fractions) > 1:
            yield (
                f"warmup_fraction {fractions[0]} and decay_fraction {fractions[1]} add up to more "
                "than 1"
            )

    def stage_problems(self) -> Iterator[str]:
        """What is wrong with it for a stage, or for a run without any.

        Not with the config itself: stages may replace its length and its schedule.
        """
        warmup, decay = self.phase_steps
        if warmup + decay > self.steps:
            yield (
                f"a warm-up of {warmup} and a decay of {decay} steps are more than the "
                f"{self.steps} steps"
            )
        least = self.min_learning_rate
        if self.schedule == "constant" and least != TrainingConfig.min_learning_rate:
            yield f"min_learning_rate is {least}, and schedule constant does not use it"

    @property
    def micro_batch_size(self) -> int:
        """Sequences computed at once."""
        return self.batch_size // self.gradient_accumulation_steps

    @property
    def phase_steps(self) -> tuple[int, int]:
        """Steps of the warm-up and of the decay."""
        warmup = self.warmup_steps
        if warmup is None:
            warmup = round(_given(self.warmup_fraction, WARMUP_FRACTION) * self.steps)
        if self.schedule == "constant":
            return warmup, 0
        if self.schedule != "wsd":
            return warmup, max(self.steps - warmup, 0)
        if self.decay_steps is not None:
            return warmup, self.decay_steps
        decay = round(_given(self.decay_fraction, DECAY_FRACTION) * self.steps)
        if None not in (self.decay_fraction, self.warmup_steps):
            return warmup, decay
        # The default, or a fraction rounded up, ends with the stage.
        return warmup, min(decay, max(self.steps - warmup, 0))


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
