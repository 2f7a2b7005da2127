"""Resuming a run with other settings: more steps or stages, and other updates."""

from collections.abc import Iterator

from hymba_jax.config.field_types import leaves
from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import SCHEDULE_SETTINGS
from hymba_jax.run_files import FOLDER
from hymba_jax.training.schedule import run_schedule

_OF_UPDATES = (
    *("compute.dtype", "training.weight_decay", "training.beta1", "training.beta2"),
    *("training.muon_momentum", "training.muon_update_rms", "training.clip_norm"),
    *("training.z_loss", "training.on_nonfinite"),
)
"""Settings that decide an update, beside the learning rate, and may change between two."""


def describe_changes(previous: RunConfig, config: RunConfig, step: int) -> Iterator[str]:
    """What a config changes in a run: its stages, their learning rates and its updates.

    Args:
      previous: the config that the run had before.
      step: steps done.
    """
    news = {stage.name: stage for stage in config.resolved_stages}
    # A run without stages may be the first of several.
    olds = {stage.name or next(iter(news)): stage for stage in previous.resolved_stages}
    for name in (name for name in news if name in olds):
        old, new = olds[name], news[name]
        if old.run.training.steps != new.run.training.steps:
            yield (
                f"{new.label} has {new.run.training.steps:,} steps, where it had "
                f"{old.run.training.steps:,}"
            )
        was_decaying = old.decay_start is not None and old.start <= old.decay_start < step
        if was_decaying and step <= old.stop and new.stop != old.stop:
            rates = [_rate(run, step) for run in (previous, config)]
            yield (
                f"{new.label} decays since step {old.decay_start}: at step {step} the learning "
                f"rate was {rates[0]:.3g}, from there on it is what the longer schedule has, "
                f"{rates[1]:.3g}; to decay only once, go back to before the decay: remove the "
                f"checkpoints after {FOLDER}/{old.decay_start} and run this again"
            )
        elif old.start <= step < min(old.stop, new.stop):
            before, now = (_rate(run, step + 1) for run in (previous, config))
            if before != now:
                yield f"the learning rate of step {step + 1:,} is {now:.3g}, it was {before:.3g}"
        if step < new.stop:
            for setting in SCHEDULE_SETTINGS:
                before, now = (getattr(stage.run.training, setting) for stage in (old, new))
                if before != now:
                    yield f"{new.label}: {setting} is {now!r}, it was {before!r}"
    for change, these, others in (("removed", olds, news), ("added", news, olds)):
        if names := [name for name in these if name not in others]:
            yield f"stages {change}: {', '.join(names)}"
    settings = [dict(leaves(run, "")) for run in (previous, config)]
    for name in _OF_UPDATES:
        before, now = (each[name] for each in settings)
        if before != now:
            yield f"{name} is {now!r} from step {step + 1:,} on, it was {before!r}"


def _rate(run: RunConfig, step: int) -> float:
    """The learning rate of a step of a run."""
    return float(run_schedule(run)(step - 1))
