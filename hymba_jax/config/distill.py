"""Distillation: a student learns the distribution of a teacher."""

from collections.abc import Iterator
from dataclasses import dataclass

from hymba_jax.config.field_types import Bounds, bound_problems, type_problems
from hymba_jax.errors import HymbaError

_BOUNDS = {
    "temperature": Bounds(1e-3, 1e3, "all tokens would be as likely", "one token would have all"),
    "weight": Bounds(1e-30, 1, "the loss would reward errors", "nothing would be distilled"),
}


@dataclass(frozen=True)
class DistillConfig:
    """Options of `training.objective = "distill"` (arXiv 1503.02531).

    With p and q the softmax of the teacher's logits and the model's, divided by `temperature`, the
    loss is (1 - weight) cross entropy + weight temperature^2 KL(p || q), in nats per token.

    Attributes:
      teacher: directory of a run or a model, native or HF, with the same vocabulary; its parameters
        are frozen, of the compute dtype, and sharded as the model's. They are read at every start
        until the stage is done, and that dtype cannot change before.
      temperature: of the softmax.
      weight: of the divergence; that of the cross entropy is the rest.

    Raises:
      HymbaError: naming every invalid value.
    """

    teacher: str = ""
    temperature: float = 1.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._value_problems()]
        if problems:
            raise HymbaError("distill config: " + "; ".join(problems))

    def _value_problems(self) -> Iterator[str]:
        yield from bound_problems(self, _BOUNDS)


NO_DISTILLATION = DistillConfig()
"""What a run has that distills nothing."""
