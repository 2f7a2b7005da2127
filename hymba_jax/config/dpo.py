"""Preference optimization: what is made of the log-probabilities of a pair of answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hymba_jax.config.field_types import Bounds, bound_problems, shown, type_problems
from hymba_jax.errors import HymbaError

type PreferenceLoss = Literal["sigmoid", "simpo"]

_BOUNDS = {
    "beta": Bounds(1e-30, 1e30, "float32 cannot multiply by it", "nothing would be learned"),
    "label_smoothing": Bounds(0, 0.5, "above it, the rejected answer would be preferred"),
    "gamma": Bounds(0, 1e30, "float32 cannot add it"),
}
_NOT_USED_BY: dict[PreferenceLoss, tuple[str, ...]] = {
    "sigmoid": ("gamma",),
    "simpo": ("length_normalized",),
}


@dataclass(frozen=True)
class DPOConfig:
    """Options of `training.objective = "dpo"`.

    With r = log p(answer) - log p_ref(answer), a sum over the tokens of an answer, the margin of a
    pair is m = beta (r_chosen - r_rejected), and its loss

        -(1 - label_smoothing) log sigmoid(m) - label_smoothing log sigmoid(-m)

    Attributes:
      loss: "sigmoid" (DPO, arXiv 2305.18290), where p_ref is the model before the first step of the
        stage; or "simpo" (arXiv 2405.14734), which has no reference: r is the mean of log p over
        the tokens, and `gamma` is subtracted from the margin.
      beta: scale of the rewards; about 0.1 for "sigmoid", 2 for "simpo".
      label_smoothing: the probability that a label is wrong (conservative DPO).
      length_normalized: of "sigmoid", r is a mean over the tokens of an answer, not a sum.
      gamma: of "simpo", the margin that is aimed at.

    Raises:
      HymbaError: naming every invalid value.
    """

    loss: PreferenceLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False
    gamma: float = 0.0

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._value_problems()]
        if problems:
            raise HymbaError("dpo config: " + "; ".join(problems))

    def _value_problems(self) -> Iterator[str]:
        yield from bound_problems(self, _BOUNDS)
        for name in _NOT_USED_BY[self.loss]:
            value = getattr(self, name)
            if value != getattr(DPOConfig, name):
                yield f"{name} is {shown(value)}, and loss {self.loss} does not use it"

    @property
    def is_normalized(self) -> bool:
        """Whether rewards are means over the tokens of an answer."""
        return self.length_normalized or self.loss == "simpo"

    @property
    def has_reference(self) -> bool:
        """Whether the loss is relative to a reference model."""
        return self.loss != "simpo"


NO_DPO = DPOConfig()
"""What a run has that does not optimize preferences."""
