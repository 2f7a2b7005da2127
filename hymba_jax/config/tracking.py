"""Where the metrics of a run go beside its own `metrics.jsonl`."""

from dataclasses import dataclass

from hymba_jax.config.field_types import type_problems
from hymba_jax.errors import HymbaError


@dataclass(frozen=True)
class TrackingConfig:
    """Where the metrics go beside `metrics.jsonl`, which every run writes.

    Each needs the extra of its name, as in `pip install 'hymba_jax[wandb]'`.

    Attributes:
      tensorboard: writes event files into `tensorboard` of the run directory.
      wandb: project of Weights & Biases; not used if empty. WANDB_MODE, WANDB_ENTITY and so on are
        obeyed.
      trackio: project of Trackio; not used if empty. TRACKIO_SPACE_ID and so on are obeyed.

    Raises:
      HymbaError: naming every invalid value.
    """

    tensorboard: bool = False
    wandb: str = ""
    trackio: str = ""

    def __post_init__(self) -> None:
        if problems := [*type_problems(self)]:
            raise HymbaError("tracking config: " + "; ".join(problems))
