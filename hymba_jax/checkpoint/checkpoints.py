"""Checkpoints through Orbax: written asynchronously, committed by a rename.

In a gs:// bucket an object that is written last commits them. Orbax does not write to s3://
buckets, for which there is `staged_checkpoints.py`.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import absl.logging
import jax
import optax
import orbax.checkpoint as ocp
from etils import epath

from hymba_jax.checkpoint.checksums import check_tree, checksums_metadata, dotted, tree_checksums
from hymba_jax.checkpoint.train_state import TrainState
from hymba_jax.closing import Closing
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, matches, on_disk, read_json, resolve_location
from hymba_jax.model.abstract import Params
from hymba_jax.run_files import FOLDER, checkpoint_steps, uses_orbax

PARAMS = "params"  # inside a checkpoint, and inside the directory of a standalone model
OPTIMIZER, LOOP = "optimizer", "loop"  # inside a checkpoint


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


class LoopState(NamedTuple):
    """The part of a checkpoint that is not arrays.

    Attributes:
      step: updates done.
      batches: state of the iterator of training batches.
      train_digest: of the training tokens.
      validation_digest: of the validation tokens.
    """

    step: int
    batches: dict[str, Any]
    train_digest: str
    validation_digest: str


class Checkpoints(Closing):
    """The checkpoints of a run, as a context manager: exiting waits for the last write.

    Args:
      run_directory: holds them in its folder `checkpoints`, one directory per step.
      keep: how many stay, newest first.
      on_written: is called by the thread that writes, before each is complete.
    """

    def __init__(
        self,
        run_directory: str | os.PathLike[str],
        keep: int,
        on_written: Callable[[], None] | None = None,
    ):
        self.directory = (resolve_location(run_directory) / FOLDER).absolute()
        with one_line(self.directory, "cannot be used for checkpoints"):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    cleanup_tmp_directories=True,
                    enable_background_delete=True,
                    async_options=ocp.AsyncOptions(post_finalization_callback=on_written),
                ),
            )

    def restore(self, abstract: TrainState) -> tuple[TrainState, LoopState]:
        """The newest checkpoint, with the shardings of `abstract`.

        Raises:
          HymbaError: it cannot be read, is damaged, or holds another model.
        """
        step = checkpoint_steps(self.directory.parent)[-1]
        path = self.directory / str(step)
        loop = _read_loop(
            path / LOOP / "metadata", self._restore(step, LOOP, ocp.args.JsonRestore())
        )
        trees = {}
        for part, like in ((PARAMS, abstract.params), (OPTIMIZER, abstract.optimizer)):
            metadata = _read_metadata(path / part, _UNREADABLE)
            trees[part] = self._restore(step, part, ocp.args.StandardRestore(like))
            check_tree(path / part, trees[part], metadata.custom_metadata)
        state = TrainState(trees[PARAMS], trees[OPTIMIZER])
        counts = {int(count) for _, count in optax.tree.get_all_with_path(state.optimizer, "count")}
        if {step, loop.step} | counts != {step}:
            raise HymbaError(
                f"{path}: damaged, its parts belong to different steps ({LOOP}/metadata of "
                f"{loop.step}, {OPTIMIZER} of {', '.join(map(str, sorted(counts)))}){_ADVICE}"
            )
        return state, loop

    def _restore(self, step: int, part: str, args: Any) -> Any:
        with one_line(self.directory / str(step) / part, _UNREADABLE):
            return self._manager.restore(step, args=ocp.args.Composite(**{part: args}))[part]

    def save(self, state: TrainState, loop: LoopState) -> None:
        """Copies the state and returns; a thread writes it.

        Raises:
          HymbaError: this checkpoint, or one before it, cannot be written.
        """
        with one_line(self.directory, _UNWRITABLE):  # it raises errors of earlier ones, too
            self._manager.save(
                loop.step,
                args=ocp.args.Composite(
                    params=_save_args(state.params),
                    optimizer=_save_args(state.optimizer),
                    loop=ocp.args.JsonSave(loop._asdict() | {_CHECKSUM: _loop_checksum(loop)}),
                ),
            )

    def check(self) -> None:
        """Raises HymbaError if a checkpoint could not be written in the meantime."""
        # The manager's own check_for_errors misses an error of its last thread; waiting does not.
        if not self._manager.is_saving_in_progress():
            with one_line(self.directory, _UNWRITABLE):
                self._manager.wait_until_finished()

    def close(self) -> None:
        with one_line(self.directory, _UNWRITABLE):
            self._manager.close()


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


def params_path(directory: Location, step: int | None) -> Location:
    """Where the parameters of a run's checkpoint, or of a standalone model, are.

    Raises:
      HymbaError: there is no such checkpoint.
    """
    alone, steps = directory / PARAMS, checkpoint_steps(directory)
    if alone.is_dir() and step is None:
        return alone
    if not steps or step not in (None, *steps):
        wanted = "" if step is None else f" {step}"
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
        raise HymbaError(f"{directory / FOLDER}: no checkpoint{wanted}; {there}")
    return directory / FOLDER / str(steps[-1] if step is None else step) / PARAMS


def _save_args(tree: Any) -> ocp.args.StandardSave:
    return ocp.args.StandardSave(tree, custom_metadata=checksums_metadata(tree_checksums(tree)))


def _read_metadata(path: Location, unreadable: str) -> Any:
    """Orbax's description of a stored tree, from which the tree can be restored."""
    # Orbax's error for a broken JSON file does not name it; without the first it guesses.
    for file in (path / "_METADATA", path / "_sharding", *matches(path, "array_metadatas/*")):
        if file.name == "_METADATA" or file.is_file():
            read_json(file)
    with one_line(path, unreadable):
        return ocp.StandardCheckpointHandler().metadata(epath.Path(path))


def _loop_checksum(loop: LoopState) -> int:
    return zlib.crc32(json.dumps(loop, sort_keys=True).encode())


def _read_loop(path: Location, fields: Any) -> LoopState:
    """The loop's part of a checkpoint. Raises HymbaError if it is damaged."""
    try:
        checksum = fields.pop(_CHECKSUM)
        loop = LoopState(**fields)
    except (AttributeError, KeyError, TypeError) as error:
        raise HymbaError(f"{path}: damaged, or another program wrote it{_ADVICE}") from error
    if checksum != _loop_checksum(loop):
        raise HymbaError(f"{path}: damaged, its checksum does not match{_ADVICE}")
    return loop


_CHECKSUM = "checksum"  # of the loop's state, beside it
_ADVICE = ": remove the checkpoint to resume from the one before, or choose another output"
_UNREADABLE = (
    "not a checkpoint of this model that can be read; "
    "remove it to resume from the one before, or choose another output"
)
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
        raise HymbaError(f"{path}: {what} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """The part of an error that says what happened: its innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = "" if isinstance(error, KeyError) else str(error).partition("\n")[0]
    if re.match(r"[A-Z_]+: ", text):  # TensorStore: what it was doing, to the innermost, in JSON
        file = re.search(r'local file "([^"]+)"', text)
        text = text.partition(" [tensorstore_spec")[0].rpartition(": ")[2]
        if file and file[1] not in text:
            text += f", in {file[1]}"
    return text or repr(error)
