"""Trackers: experiment tracking tools that the metrics go to, if the config asks for them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from hymba_jax.config.tracking import TrackingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.training.run_start import RunStart

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


@runtime_checkable
class Tracker(Protocol):
    """A tool that takes the metrics of a run, in its main process.

    Whatever it raises at the start of a new run stops that; later, the tool is left out.
    """

    def start(self, run: RunStart) -> None:
        """Begins a run, or continues one that is resumed; called once, before all else."""

    def write(self, step: int, metrics: Mapping[str, int | float | str]) -> None:
        """Takes the metrics of a step by their names; steps increase."""

    def close(self) -> None:
        """Delivers what is not delivered yet."""


class _ProjectTracker(ABC):
    """A tool that keeps the runs of a project.

    Steps that it has already are not sent again.
    """

    _run: Any

    def __init__(self, project: str):
        self._project = project

    def start(self, run: RunStart) -> None:
        self._tracked = run.tracked
        self._run = self._open(run, {**run.config, "git": run.git})

    @abstractmethod
    def _open(self, run: RunStart, config: dict[str, Any]) -> Any:
        """The tool's own object of the run."""

    def write(self, step: int, metrics: Mapping[str, int | float | str]) -> None:
        if step > self._tracked:
            self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Wandb(_ProjectTracker):
    """Weights & Biases, https://docs.wandb.ai; its files are in `wandb` of the run directory."""

    def _open(self, run: RunStart, config: dict[str, Any]) -> Any:
        import wandb

        return wandb.init(
            project=self._project,
            id=run.id,
            name=run.id,
            resume="allow",
            dir=str(run.directory),
            config=config,
            settings=wandb.Settings(console="off"),  # it would keep the live line, too
        )


class Trackio(_ProjectTracker):
    """Trackio, https://huggingface.co/docs/trackio."""

    def _open(self, run: RunStart, config: dict[str, Any]) -> Any:
        import trackio

        return trackio.init(
            project=self._project,
            name=run.id,
            resume="allow",
            config=config,
            embed=False,  # no dashboard in a notebook
        )


def check_trackers(config: TrackingConfig) -> None:
    """Raises HymbaError if a tracker that the config asks for is not installed."""
    for name, package in _PACKAGES.items():
        if not getattr(config, name):
            continue
        spec = find_spec(package)
        if spec is None or spec.origin is None:  # a mere folder, such as those wandb writes
            raise HymbaError(
                f"tracking.{name}: {package} is not installed: pip install 'hymba_jax[{name}]', or "
                f"leave tracking.{name} out"
            )


def make_trackers(config: TrackingConfig) -> dict[str, Tracker]:
    """The trackers that the config asks for, by their names there."""
    trackers: dict[str, Tracker] = {}
    if config.tensorboard:
        from hymba_jax.training.tensorboard import TensorBoard

        trackers["tensorboard"] = TensorBoard()
    if config.wandb:
        trackers["wandb"] = Wandb(config.wandb)
    if config.trackio:
        trackers["trackio"] = Trackio(config.trackio)
    return trackers
