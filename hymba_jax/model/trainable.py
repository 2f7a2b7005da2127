"""Which parameters a run trains: all, all but the frozen ones, or an adapter."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from hymba_jax.config.adapter import NO_ADAPTER, AdapterConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.errors import HymbaError

ADAPTER = "adapter"  # name of an adapter in the linear map that it belongs to


@dataclass(frozen=True)
class Trainable:
    """The parameters that a run trains.

    Attributes:
      adapter: if there is one, they are its own and those that match `adapter.train`.
      freeze: else all but those that match these name patterns.
    """

    adapter: AdapterConfig = NO_ADAPTER
    freeze: tuple[str, ...] = ()

    def split(self, params: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """The trained and the frozen parameters, each as nested dictionaries; see `join`."""
        flat = flatten_dict(params)
        trained = {path: leaf for path, leaf in flat.items() if self._trains(path)}
        frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
        return unflatten_dict(trained), unflatten_dict(frozen)

    def check(self, params: dict[Any, Any]) -> None:
        """Raises HymbaError if a name pattern matches none of these parameters, or all."""
        names = sorted({param_name(path): None for path in flatten_dict(params)})
        own = [name for name in names if ADAPTER not in name.split(".")]
        projections = [
            name.removesuffix(".kernel") for name in own if name.endswith("_proj.kernel")
        ]
        if self.adapter:
            _check_matches("adapter.targets", self.adapter.targets, projections)
            _check_matches("adapter.train", self.adapter.train, own)
        _check_matches("training.freeze", self.freeze, own)
        if all(matches(name, self.freeze) for name in own):
            raise HymbaError(
                f"training.freeze {' '.join(self.freeze)} freezes all parameters: nothing is left "
                "to train"
            )

    def _trains(self, path: tuple[Any, ...]) -> bool:
        if self.adapter:
            return ADAPTER in path or matches(param_name(path), self.adapter.train)
        return not matches(param_name(path), self.freeze)


TRAIN_ALL = Trainable()


def trainable_of(run: RunConfig) -> Trainable:
    """The parameters that a run trains."""
    return Trainable(run.adapter, run.training.freeze)


def join(trained: dict[Any, Any], frozen: dict[Any, Any]) -> dict[Any, Any]:
    """All parameters, of `Trainable.split`."""
    joined: dict[Any, Any] = unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))
    return joined


def describe_trainable(trainable: Trainable, params: dict[Any, Any]) -> Iterator[str]:
    """What is adapted and trained and what is not, with counts; nothing if all is trained."""
    trained, frozen = (flatten_dict(part) for part in trainable.split(params))
    if not frozen:
        return
    sizes = [sum(leaf.size for leaf in part.values()) for part in (trained, frozen)]
    adapter = trainable.adapter
    if adapter:
        kernels: dict[str, Counter[str]] = {"adapted": Counter(), "not adapted": Counter()}
        for path, leaf in frozen.items():
            if path[-1] == "kernel" and "blocks" in path:
                is_adapted = (*path[:-1], ADAPTER, "A", "kernel") in trained
                layers = leaf.shape[0] if leaf.ndim == 3 else 1
                kernels["adapted" if is_adapted else "not adapted"][param_name(path[:-1])] += layers
        shown = (
            f"{what}: {', '.join(f'{name} x {count}' for name, count in sorted(counts.items()))}"
            for what, counts in kernels.items()
            if counts
        )
        yield f"{adapter.kind} of rank {adapter.rank}; {'; '.join(shown)}"
    line = f"trained: {sizes[0]:,} of {sum(sizes):,} parameters"
    if not adapter:
        yield f"{line}; frozen: {_names(frozen)}"
    elif own := [path for path in trained if ADAPTER not in path]:
        yield f"{line}, the model's own {_names(own)} among them"
    else:
        yield line


def _names(paths: Iterable[tuple[Any, ...]]) -> str:
    return ", ".join(sorted({param_name(path) for path in paths})) or "none"


def param_name(path: Sequence[Any]) -> str:
    """The dotted name of a parameter, without the layer that it belongs to."""
    parts = list(map(str, path))
    if "blocks" in parts:
        parts = parts[parts.index("blocks") + 2 :]
    return ".".join(parts)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether consecutive parts of a dotted name match one of the patterns."""
    return any(fnmatchcase(f".{name}.", f"*.{pattern}.*") for pattern in patterns)


def _check_matches(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    unknown = [pattern for pattern in patterns if not any(matches(n, [pattern]) for n in names)]
    if unknown:
        raise HymbaError(
            f"{option} has {', '.join(map(repr, unknown))}, which matches nothing: there are "
            f"{', '.join(names)}"
        )
