"""Evaluations during training: validation, and those that a program adds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from flax import nnx

from hymba_jax.config.field_types import TABLE_NAME
from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import Params
from hymba_jax.training.validation import Validate


@runtime_checkable
class Evaluation(Protocol):
    """A measurement of the model on a schedule, such as the accuracy of a recall task."""

    @property
    def name(self) -> str:
        """Its metrics are recorded as `NAME/METRIC`."""

    @property
    def every(self) -> int:
        """Steps between runs; it also runs after the last step of a stage."""

    def run(
        self, params: Params, graph: nnx.GraphDef[Hymba], step: int
    ) -> Mapping[str, int | float]:
        """The metrics after a step, of the model `nnx.merge(graph, params)`.

        All processes call it, with their shards of the parameters, and must return the same. It may
        run again for a step after which the run was interrupted.
        """


class Evaluations:
    """What is measured during training, and when.

    Args:
      validate: runs every `validate_every` steps.
      evaluations: run after it.
      graph: of the model.
      steps: of the run when the stage ends; then everything runs, and validation on all text.
      stops: whether to stop, asked before every evaluation.
    """

    def __init__(
        self,
        validate: Validate,
        validate_every: int,
        evaluations: Sequence[Evaluation],
        graph: nnx.GraphDef[Hymba],
        steps: int,
        stops: Callable[[], bool],
    ):
        self._validate, self._validate_every = validate, validate_every
        self._evaluations, self._graph = evaluations, graph
        self._steps, self._stops = steps, stops

    def are_due(self, step: int) -> bool:
        """Whether anything is to be measured after a step."""
        return any(
            self._is_due(step, every)
            for every in (self._validate_every, *(each.every for each in self._evaluations))
        )

    def run(self, params: Params, step: int) -> dict[str, int | float] | None:
        """The metrics of all that is due after a step; None if the run was asked to stop."""
        metrics: dict[str, int | float] = {}
        if self._is_due(step, self._validate_every):
            validation = self._validate(params, step == self._steps)
            if validation is None:
                return None
            metrics |= validation
        for each in self._evaluations:
            if not self._is_due(step, each.every):
                continue
            if self._stops():
                return None
            values = each.run(params, self._graph, step)
            metrics |= {f"{each.name}/{name}": value for name, value in values.items()}
        return metrics

    def _is_due(self, step: int, every: int) -> bool:
        return step == self._steps or step % every == 0


def check_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """Raises HymbaError if metrics could not be told apart, or a schedule is none."""
    names = [each.name for each in evaluations]
    for each in evaluations:
        if not TABLE_NAME.fullmatch(each.name) or names.count(each.name) > 1:
            raise HymbaError(
                f"evaluation {each.name!r}: choose another name, which no other evaluation has, of "
                "letters, digits, - and _"
            )
        if each.every < 1:
            raise HymbaError(f"evaluation {each.name}: every is {each.every}, below 1")
