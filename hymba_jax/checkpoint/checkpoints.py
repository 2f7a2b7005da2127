"""Checkpoints through Orbax: written asynchronously, committed by a rename.

In a gs:// bucket an object that is written last commits them. Orbax does not write to s3://
buckets, for which there is `uploaded_checkpoints.py`.

A checkpoint has three parts: `params` and `optimizer`, which are trees of arrays, and `loop`, JSON
with what the loop itself needs. Nothing else in a run has a state: randomness comes from the seed
and the step. Each part has checksums, and data that does not match them is never used.
"""

import json
import logging
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import absl.logging
import jax
import optax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from hymba_jax.checkpoint.checksums import check_tree, checksums_metadata, dotted, tree_checksums
from hymba_jax.checkpoint.preservation import Best, Preservation
from hymba_jax.checkpoint.train_state import TrainState
from hymba_jax.closing import Closing
from hymba_jax.errors import HymbaError
from hymba_jax.files import (
    Location,
    matches,
    on_disk,
    read_json,
    rename,
    replace_text,
    resolve_location,
)
from hymba_jax.model.abstract import Params
from hymba_jax.parallel.processes import barrier, gather, is_main_process
from hymba_jax.run_files import FOLDER, checkpoint_steps, uses_orbax

PARAMS = "params"  # inside a checkpoint, and inside the directory of a standalone model
OPTIMIZER, LOOP = "optimizer", "loop"  # inside a checkpoint
_LOOP_FILE = "metadata"  # where Orbax has the JSON of `loop`
_METADATA = "_METADATA"  # of Orbax, in the directory of a tree

type Step = int | Literal["best"]
"""Which checkpoint of a run."""


def silence_orbax() -> None:
    """Silences Orbax's own messages, as errors are reported as exceptions; for commands, not
    libraries.

    If many arrays cannot be read or written, Orbax raises one error and drops the others, which
    Python would report as unhandled.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def report_unless_dropped(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error.__cause__, GeneratorExit) or "Event loop is closed" in str(error)):
            report(unraisable)

    sys.unraisablehook = report_unless_dropped


def always(_: int) -> bool:
    """A schedule of checkpoints: after every step that is saved."""
    return True


class LoopState(NamedTuple):
    """The part of a checkpoint that is not arrays.

    Attributes:
      step: steps done.
      digests: of the tokens of each source, by its name.
      skipped: steps among them whose update was skipped.
      validation_due: whether validation and evaluations after `step` are still to be done.
      recorder: state of the recorder of metrics.
      best: step and validation loss of the best checkpoint so far.
    """

    step: int
    digests: dict[str, str]
    skipped: int = 0
    validation_due: bool = False
    recorder: dict[str, Any] | None = None
    best: tuple[int, float] | None = None


class Checkpoints(Closing):
    """The checkpoints of a run, as a context manager: exiting waits for the last write.

    Args:
      run_directory: holds them in its folder `checkpoints`, one directory per step.
      keep: how many on schedule stay, newest first; the newest of all does anyway.
      keep_steps: others that stay.
      keep_best: whether the best one stays, too.
      is_scheduled: whether a step's is on schedule.
    """

    def __init__(
        self,
        run_directory: str | os.PathLike[str],
        keep: int,
        keep_steps: Sequence[int] = (),
        *,
        keep_best: bool = False,
        is_scheduled: Callable[[int], bool] = always,
    ):
        self.directory = (resolve_location(run_directory) / FOLDER).absolute()
        self._keep_best = keep_best
        self._preservation = Preservation(keep, is_scheduled, keep_steps)
        self._open(self.directory, self._preservation)

    def _open(
        self,
        directory: Location,
        policy: PreservationPolicy,
        on_written: Callable[[], None] | None = None,
    ) -> None:
        """Opens Orbax's manager.

        Args:
          directory: where it writes.
          policy: which of what is there stays.
          on_written: is called by the thread that writes, before each checkpoint is complete.
        """
        with one_line(self.directory, "cannot be used for checkpoints"):
            self._manager = ocp.CheckpointManager(
                os.fspath(directory),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy,
                    cleanup_tmp_directories=True,
                    enable_background_delete=True,
                    async_options=ocp.AsyncOptions(post_finalization_callback=on_written),
                ),
            )

    def restore(
        self, abstract: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, LoopState]:
        """The newest intact checkpoint, with the shardings of `abstract`.

        Damaged ones that are newer are renamed. Every process gets the same.

        Args:
          say: is told of each.

        Raises:
          HymbaError: none is intact, or it is of another model or optimizer.
        """
        damaged: dict[int, str] = {}
        for step in reversed(checkpoint_steps(self.directory.parent)):
            try:
                restored = self._read(step, abstract)
            except _DamagedError as error:
                damaged[step] = str(error)
                continue
            for other, problem in damaged.items():
                say(f"{problem}: set aside as {self._set_aside(other)}, step {step} is used")
            if damaged:
                self._manager.reload()
            self._preservation.best = self._restored_best(restored[1])
            return restored
        raise HymbaError(
            f"{self.directory}: no checkpoint is intact ({'; '.join(damaged.values())}): restore "
            "one from a copy, or choose another output"
        )

    def _restored_best(self, loop: LoopState) -> Best | None:
        """The best checkpoint so far, if it is there."""
        best = Best(*loop.best) if self._keep_best and loop.best else None
        return best if best and (self.directory / str(best.step)).is_dir() else None

    def improves(self, step: int, loss: float) -> bool:
        """Whether the validation loss of a step is the lowest so far, and that checkpoint is kept.

        Then a checkpoint of the step is due; it replaces the best so far.
        """
        return self._keep_best and self._preservation.improves(step, loss)

    def forget_best(self) -> None:
        """Makes the next validation the best so far, where earlier ones were of other text."""
        self._preservation.best = None

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, LoopState]:
        """A checkpoint, if it is intact for all processes. Raises _DamagedError if it is not."""
        return read_checkpoint(self.directory / str(step), step, abstract)

    def _set_aside(self, step: int) -> str:
        """Renames a damaged checkpoint, for all processes; its new name."""
        path, count = self.directory / str(step), 1
        while (aside := path.with_name(f"{step}.damaged-{count}")).exists():
            count += 1
        barrier("the names of damaged checkpoints")
        if is_main_process():
            rename(path, aside.name)
        barrier("damaged checkpoints")
        return aside.name

    def save(self, state: TrainState, loop: LoopState) -> None:
        """Copies the state and returns; a thread writes it.

        A checkpoint that is there already keeps its state, and gets the loop's part anew. `best`
        becomes the best checkpoint so far.

        Raises:
          HymbaError: this checkpoint, or one before it, cannot be written.
        """
        loop = loop._replace(best=self._preservation.best)
        fields = loop._asdict() | {_CHECKSUM: _loop_checksum(loop)}
        written = self.directory / str(loop.step) / LOOP / _LOOP_FILE
        if written.is_file():
            if is_main_process():
                replace_text(written, json.dumps(fields))
            return
        with one_line(self.directory, _UNWRITABLE):  # it raises errors of earlier ones, too
            self._manager.save(
                loop.step,
                args=ocp.args.Composite(
                    params=_save_args(state.params),
                    optimizer=_save_args(state.optimizer),
                    loop=ocp.args.JsonSave(fields),
                ),
            )

    def wait(self) -> None:
        """Waits for the last write. Raises HymbaError if it failed."""
        with one_line(self.directory, _UNWRITABLE):
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises HymbaError if a checkpoint could not be written in the meantime."""
        # The manager's own check_for_errors misses an error of its last thread; waiting does not.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        with one_line(self.directory, _UNWRITABLE):
            self._manager.close()


def read_checkpoint(
    path: Location, step: int, abstract: TrainState
) -> tuple[TrainState, LoopState]:
    """A checkpoint, if it is intact for all processes. Raises _DamagedError if it is not."""
    trees, metadata = {}, {}
    # Handlers, as the manager waits for all processes though one may have failed.
    with _agreed(path):
        loop = read_loop(path / LOOP)
        for part, like in ((PARAMS, abstract.params), (OPTIMIZER, abstract.optimizer)):
            metadata[part] = _read_metadata(path / part, _UNREADABLE)
            _check_layout(path / part, like, metadata[part])
            with one_line(path / part, _UNREADABLE):
                trees[part] = ocp.StandardCheckpointHandler().restore(
                    epath.Path(path / part), args=ocp.args.StandardRestore(like)
                )
    with _agreed(path):
        for part, tree in trees.items():
            check_tree(path / part, tree, metadata[part].custom_metadata)
        state = TrainState(trees[PARAMS], trees[OPTIMIZER])
        _check_steps(path, step, loop, state.optimizer)
    return state, loop


def load_params(
    directory: str | os.PathLike[str], abstract: Params, step: int | None = None
) -> Params:
    """The parameters of a run's checkpoint, without its optimizer state, or of a standalone model.

    Args:
      directory: of a run, or one that `save_params` wrote to.
      abstract: shape, dtype and sharding of every parameter, as in `TrainState.params`.
      step: which checkpoint of a run; the newest if absent.

    Raises:
      HymbaError: there is no such checkpoint, or it cannot be read, or holds another model.
    """
    path = params_path(resolve_location(directory).absolute(), step)
    with nullcontext(path) if uses_orbax(path) else on_disk(path) as readable:
        return _load_params(readable, abstract)


def _load_params(path: Location, abstract: Params) -> Params:
    unreadable = "not parameters of this model that can be read"
    metadata = _read_metadata(path, unreadable)
    stored = {dotted(keys): leaf for keys, leaf in jax.tree.leaves_with_path(metadata.tree)}

    def as_stored(keys: Any, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Orbax's placeholder for an array that the stored tree lacks.
        return like.update(dtype=getattr(stored.get(dotted(keys)), "dtype", like.dtype))

    with one_line(path, unreadable), ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(path, jax.tree.map_with_path(as_stored, abstract))
    check_tree(path, params, metadata.custom_metadata)
    arrays, tree = jax.tree.flatten(params)
    del params
    for i, like in enumerate(jax.tree.leaves(abstract)):
        arrays[i] = arrays[i].astype(like.dtype)  # one by one, so that few arrays exist twice
    return jax.tree.unflatten(tree, arrays)


def save_params(directory: str | os.PathLike[str], params: Params) -> None:
    """Writes parameters into the directory of a standalone model.

    Raises:
      HymbaError: they cannot be written.
    """
    path = resolve_location(directory).absolute() / PARAMS
    checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    with one_line(path, "parameters cannot be written"), checkpointer:
        checkpointer.save(path, args=_save_args(params))


def resolve_step(directory: str | os.PathLike[str], step: Step | None) -> int | None:
    """The step of the best checkpoint of a run, if that is asked for, and any other as it is.

    Raises:
      HymbaError: the run knows no best checkpoint.
    """
    if step != "best":
        return step
    location = resolve_location(directory)
    steps = checkpoint_steps(location)
    if not steps:
        raise HymbaError(f"{location / FOLDER}: no checkpoint {step}; there is none")
    newest = location / FOLDER / str(steps[-1])
    best = read_loop(newest / LOOP).best
    if best is None:
        raise HymbaError(
            f"{newest}: knows no best checkpoint, as there was no validation yet or "
            "training.keep_best was false: name a step"
        )
    return Best(*best).step


def loaded_step(directory: str | os.PathLike[str], step: Step | None) -> int | None:
    """The step of the checkpoint that is loaded: as of `resolve_step`, or if none is named the
    newest of a run; None of a standalone model.

    Raises:
      HymbaError: the run knows no best checkpoint.
    """
    if step is None:
        return max(checkpoint_steps(resolve_location(directory)), default=None)
    return resolve_step(directory, step)


def params_path(directory: Location, step: int | None) -> Location:
    """Where the parameters of a run's checkpoint, or of a standalone model, are.

    Raises:
      HymbaError: there is no such checkpoint, or it has no parameters.
    """
    alone, steps = directory / PARAMS, checkpoint_steps(directory)
    if alone.is_dir() and step is None:
        _check_there(alone, "")
        return alone
    if not steps or step not in (None, *steps):
        wanted = "" if step is None else f" {step}"
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        raise HymbaError(f"{directory / FOLDER}: no checkpoint{wanted}; {there}")
    step = steps[-1] if step is None else step
    path = directory / FOLDER / str(step) / PARAMS
    others = ", ".join(str(other) for other in steps if other != step)
    _check_there(path, f", or name another step ({others})" if others else "")
    return path


def _check_there(params: Location, alternative: str) -> None:
    """Raises HymbaError if a checkpoint has no parameters, though its directory is complete."""
    if not (params / _METADATA).is_file():
        raise HymbaError(
            f"{params.parent}: damaged, it has no {PARAMS}/{_METADATA}: restore it from a copy"
            f"{alternative}"
        )


def _save_args(tree: Any) -> ocp.args.StandardSave:
    metadata = checksums_metadata(tree_checksums(tree)) | {_LAYOUT: _layout(tree)}
    return ocp.args.StandardSave(tree, custom_metadata=metadata)


def _read_metadata(path: Location, unreadable: str) -> Any:
    """Orbax's description of a stored tree, from which the tree can be restored."""
    # Orbax's error for a broken JSON file does not name it; without the first it guesses.
    for file in (path / _METADATA, path / "_sharding", *matches(path, "array_metadatas/*")):
        if file.name == _METADATA or file.is_file():
            read_json(file)
    with one_line(path, unreadable):
        return ocp.StandardCheckpointHandler().metadata(epath.Path(path))


def _loop_checksum(loop: LoopState) -> int:
    return zlib.crc32(json.dumps(loop, sort_keys=True).encode())


def trained_on(run_directory: str) -> dict[str, str]:
    """The digests of the tokens that the newest checkpoint depends on; none if there is none."""
    directory = resolve_location(run_directory)
    for step in reversed(checkpoint_steps(directory)):
        with suppress(HymbaError):  # damaged: the one before it is used
            return read_loop((directory / FOLDER / str(step) / LOOP).absolute()).digests
    return {}


def read_loop(directory: Location) -> LoopState:
    """The loop's part of a checkpoint. Raises HymbaError if it is damaged."""
    path = directory / _LOOP_FILE
    with one_line(directory, _UNREADABLE):
        fields = ocp.JsonCheckpointHandler().restore(epath.Path(directory), ocp.args.JsonRestore())
    try:
        checksum = fields.pop(_CHECKSUM)
        loop = LoopState(**fields)
    except (AttributeError, KeyError, TypeError) as error:
        raise HymbaError(f"{path}: damaged, or another program wrote it") from error
    if checksum != _loop_checksum(loop):
        raise HymbaError(f"{path}: damaged, its checksum does not match")
    return loop


def _check_layout(path: Location, abstract: Any, metadata: Any) -> None:
    """Raises _OtherLayoutError if a stored tree is intact, as far as is known, but has other
    arrays."""
    stored = (metadata.custom_metadata or {}).get(_LAYOUT)
    if stored == _layout(metadata.tree) != _layout(abstract):
        raise _OtherLayoutError(
            f"{path}: holds arrays of other names, shapes or dtypes than this run's: undo the "
            "changes of model or optimizer, or choose another output"
        )


def _layout(tree: Any) -> int:
    """A checksum of names, shapes and dtypes of the arrays of a tree."""
    arrays = [
        (dotted(path), list(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]
    return zlib.crc32(json.dumps(sorted(arrays)).encode())


def _check_steps(path: Location, step: int, loop: LoopState, optimizer: optax.OptState) -> None:
    """Raises HymbaError unless all parts of a checkpoint are of its step."""
    counts = {int(count) for _, count in optax.tree.get_all_with_path(optimizer, "count")}
    if loop.step != step or counts - {step - loop.skipped}:
        raise HymbaError(
            f"{path}: damaged, its parts belong to different steps ({LOOP}/metadata of "
            f"{loop.step}, {OPTIMIZER} of {', '.join(map(str, sorted(counts)))})"
        )


class _DamagedError(HymbaError):
    """A checkpoint does not hold what was saved."""


class _OtherLayoutError(HymbaError):
    """A checkpoint holds what was saved, which is not what this run needs."""


@contextmanager
def _agreed(path: Location) -> Iterator[None]:
    """Raises in every process what one of them raises inside: _DamagedError if it is damage.

    Otherwise the others would wait for that process.

    Args:
      path: where the checkpoint is read.
    """
    raised: HymbaError | None = None
    try:
        yield
    except HymbaError as error:
        raised = error
    own = None if raised is None else (str(raised), _is_damage(raised, path))
    for problem in gather(own):
        if problem is not None:
            message, is_damage = problem
            raise (_DamagedError if is_damage else HymbaError)(message) from raised


def _is_damage(error: BaseException, path: Location) -> bool:
    """Whether an error says that files are damaged, not that this process cannot use them."""
    others = (_OtherLayoutError, MemoryError, PermissionError, jax.errors.JaxRuntimeError)
    while not isinstance(error, others):
        if error.__cause__ is None:
            return isinstance(path, Path) or _is_of_content(error)
        error = error.__cause__
    return False


def _is_of_content(error: BaseException) -> bool:
    """Whether an error about files in a bucket is about what they hold, not about reaching them."""
    kinds = (HymbaError, FileNotFoundError, KeyError, ValueError)
    return isinstance(error, kinds) and not _UNREACHED.match(str(error))


# What TensorStore's errors begin with.
_UNREACHED = re.compile(
    "ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED|"
    "UNAUTHENTICATED|UNAVAILABLE|UNKNOWN"
)


_LAYOUT = "layout"  # in the metadata of a tree
_CHECKSUM = "checksum"  # of the loop's state, beside it
_UNREADABLE = "not a checkpoint of this model that can be read"
_UNWRITABLE = (
    "a checkpoint cannot be written; "
    "fix the storage and run the same command to resume from the last complete one"
)


@contextmanager
def one_line(path: Location, what: str) -> Iterator[None]:
    """Turns whatever Orbax raises, which has many types, into one line about `path`."""
    try:
        yield
    except HymbaError:
        raise
    except Exception as error:
        reason = _reason(error).replace(f"{path}/", "")  # of which files are named
        raise HymbaError(f"{path}: {what} ({reason})") from error


def _reason(error: BaseException) -> str:
    """The part of an error that says what happened: its innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = "" if isinstance(error, KeyError) else str(error).partition("\n")[0]
    # TensorStore: what it was doing, to the innermost, in JSON.
    if re.match(r"[A-Z_]+: ", text) or "[tensorstore_spec" in text:
        file = re.search(r'local file "([^"]+)"', text)
        text = text.partition(" [tensorstore_spec")[0].rpartition(": ")[2]
        if file and file[1] not in text:
            text += f", in {file[1]}"
    return text or repr(error)
