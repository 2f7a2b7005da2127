"""Parameters in Orbax's form, written and read a few arrays at a time."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import unflatten_dict

from hymba_jax.checkpoint.checkpoints import one_line
from hymba_jax.checkpoint.checksums import (
    Checksums,
    check_tree,
    checksums_metadata,
    dotted,
    tree_checksums,
)
from hymba_jax.convert.tensor_file import TensorInfo, drop_cached
from hymba_jax.errors import HymbaError
from hymba_jax.files import open_regular
from hymba_jax.model.abstract import ParamPath

THREADS = 8  # each has an array or two in memory, and most wait for the disk
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


def write_params(path: Path, sources: Mapping[ParamPath, LazyArray]) -> None:
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
        super().__init__()
        self._checksums = checksums

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        for info in infos:
            await info.await_path_creation()
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(self._write, values, infos))
        return []

    def _write(self, source: LazyArray, info: Any) -> None:
        array = source.make()
        directory = Path(info.parent_dir, info.name)
        dtype = source.dtype if source.dtype == "bfloat16" else np.dtype(source.dtype).str
        metadata = {"shape": source.shape, "chunks": source.shape, "dtype": dtype}
        spec = _spec(directory) | {"metadata": metadata | {"compressor": None}}
        store = tensorstore.open(spec, create=True).result()
        store.write(array, can_reference_source_data_indefinitely=True).result()
        for file in directory.iterdir():
            drop_cached(file)
        self._checksums |= tree_checksums({info.name: array})


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
        with one_line(path, _UNREADABLE):
            for file in self.path.rglob("*"):
                if not file.is_dir():
                    with open_regular(file):  # TensorStore would wait for a FIFO's writer
                        pass
            metadata = ocp.PyTreeCheckpointer().metadata(self.path).item_metadata
            self._metadata = metadata.custom_metadata
        self.tensors = {
            dotted(keys): TensorInfo(str(leaf.dtype), tuple(leaf.shape))
            for keys, leaf in jax.tree.leaves_with_path(metadata.tree)
        }
        self._is_ocdbt = (self.path / "manifest.ocdbt").is_file()

    def read(self, name: str) -> np.ndarray:
        """The array of this dotted path; from any thread.

        Raises:
          HymbaError: it cannot be read, or is damaged.
        """
        spec = _spec(self.path, name) if self._is_ocdbt else _spec(self.path / name)
        with one_line(self.path, _UNREADABLE):
            array: np.ndarray = tensorstore.open(spec, open=True).result().read().result()
        check_tree(self.path, {name: array}, self._metadata)
        return array

    def damage(self) -> list[str]:
        """Reads all arrays; what cannot be read or is damaged, in words."""
        problems = []
        for name in self.tensors:
            try:
                self.read(name)
            except HymbaError as error:
                problems.append(str(error))
        return problems


def _spec(directory: Path, name: str | None = None) -> dict[str, Any]:
    """TensorStore's description of an array in a directory, or in the OCDBT database there."""
    store: dict[str, Any] = {"driver": "file", "path": f"{directory}/"}
    if name is not None:
        store = {"driver": "ocdbt", "base": store, "path": f"{name}/"}
    # Otherwise an array whose file is missing would be read as zeros.
    return {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
