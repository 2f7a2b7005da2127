"""Parameters in Orbax's form, written and read a few arrays at a time."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from hymba_jax.convert import mapping
from hymba_jax.convert.tensor_file import TensorInfo
from hymba_jax.errors import HymbaError
from hymba_jax.files import open_regular
from hymba_jax.training.checkpoint import one_line
from hymba_jax.training.checksums import (
    Checksums,
    check_tree,
    checksums_metadata,
    dotted,
    tree_checksums,
)

THREADS = 8  # each has an array or two in memory, and most wait for the disk
_BATCH = 128 * 10**6  # bytes; each call of Orbax takes some time by itself
_UNREADABLE = "not parameters that can be read"


@dataclass(frozen=True, eq=False)
class LazyArray:
    """An array that is computed when it is written.

    Attributes:
      make: computes it; called from any thread.
    """

    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]


def write_params(path: Path, sources: Mapping[mapping.Path, LazyArray]) -> None:
    """Writes parameters as an Orbax checkpoint of a tree, with few of them in memory at a time.

    Raises:
      HymbaError: they cannot be computed or written.
    """
    checksums: Checksums = {}
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (LazyArray, _LazyArrayHandler(checksums))
        ),
        use_compression=False,
        use_ocdbt=False,  # a file for each array, so that threads write at the same time
    )
    # Orbax writes the metadata when all arrays are written, and their checksums known.
    args = ocp.args.PyTreeSave(
        unflatten_dict(sources), custom_metadata=checksums_metadata(checksums)
    )
    with one_line(path, "parameters cannot be written"), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.absolute(), args=args)


class _LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Computes arrays and writes them in several threads.

    Args:
      checksums: the checksum of every array is added to it.
    """

    def __init__(self, checksums: Checksums):
        super().__init__(deepcopy_host_arrays=False)
        self._checksums = checksums

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        for info in infos:
            await info.await_path_creation()
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(self._write, values, infos, args or [ocp.SaveArgs()] * len(values)))
        return []

    def _write(self, source: LazyArray, info: Any, args: Any) -> None:
        array = source.make()
        asyncio.run(self._store(array, info, args))
        self._checksums |= tree_checksums({info.name: array})

    async def _store(self, array: np.ndarray, info: Any, args: Any) -> None:
        """Waits until the array is on the disk."""
        for writing in await super().serialize([array], [info], [args]):
            writing.result()


class StoredParams:
    """Parameters that Orbax wrote, or `write_params`, to read from; or an optimizer's state.

    Attributes:
      path: the directory of its files.
      tensors: dtype and shape of every array, by its dotted path.

    Raises:
      HymbaError: they cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._checkpointer = ocp.PyTreeCheckpointer()
        self._restoring = threading.Lock()
        with one_line(path, _UNREADABLE):
            for file in self.path.rglob("*"):
                if not file.is_dir():
                    with open_regular(file):  # TensorStore would wait for a FIFO's writer
                        pass
            metadata = self._checkpointer.metadata(self.path).item_metadata
            tree, self._metadata = metadata.tree, metadata.custom_metadata
        self._structure = jax.tree.structure(tree)
        self.tensors = {
            dotted(keys): TensorInfo(str(leaf.dtype), tuple(leaf.shape))
            for keys, leaf in jax.tree.leaves_with_path(tree)
        }

    def batches(self) -> Iterator[list[str]]:
        """The paths of all arrays, as many together as are best read at once."""
        batch: list[str] = []
        size = 0
        for path, info in self.tensors.items():
            if batch and size + info.nbytes > _BATCH:
                yield batch
                batch, size = [], 0
            batch.append(path)
            size += info.nbytes
        yield batch

    def read(self, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Arrays with their dotted paths; from any thread.

        Raises:
          HymbaError: they cannot be read, or are not as they were written.
        """
        arrays = self._read(paths)
        for path in paths:
            array = arrays.pop(path)
            check_tree(self.path, {path: array}, self._metadata)
            yield path, array

    def damage(self) -> list[str]:
        """Reads all arrays; what cannot be read or is not as it was written, in words."""
        problems = []
        for paths in self.batches():
            try:
                arrays = self._read(paths)
            except HymbaError as error:
                problems.append(str(error))
                continue
            for path, array in arrays.items():
                try:
                    check_tree(self.path, {path: array}, self._metadata)
                except HymbaError as error:
                    problems.append(str(error))
        return problems

    def _read(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """By Orbax, which uses all processors itself."""
        like = [
            jax.ShapeDtypeStruct(*reversed(info)) if path in paths else ocp.PLACEHOLDER
            for path, info in self.tensors.items()
        ]
        restore = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(like)
        item, restore_args = (jax.tree.unflatten(self._structure, v) for v in (like, restore))
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
        with one_line(self.path, _UNREADABLE), self._restoring:
            arrays = jax.tree.leaves(self._checkpointer.restore(self.path, args=args))
        return {path: a for path, a in zip(self.tensors, arrays, strict=True) if path in paths}
