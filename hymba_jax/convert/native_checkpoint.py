"""A native checkpoint, of a standalone model or of a training run, to convert or to inspect."""

from collections import defaultdict
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from hymba_jax.checkpoint.checkpoints import LOOP, OPTIMIZER, params_path, read_loop
from hymba_jax.checkpoint.checksums import dotted
from hymba_jax.checkpoint.model_file import read_model_directory, read_trainable
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.config.run import CONFIG_FILE
from hymba_jax.convert.mapping import ConversionError, HFSlice, hf_slices, mismatches
from hymba_jax.convert.params_stream import StoredParams
from hymba_jax.convert.tensor_file import TensorInfo
from hymba_jax.errors import HymbaError
from hymba_jax.model.abstract import ParamPath, param_shapes
from hymba_jax.model.lora import LowRankUpdate
from hymba_jax.model.trainable import ADAPTER


class AdaptedParams:
    """The parameters of a run with an adapter, which is merged into each kernel as it is read.

    Attributes:
      path, tensors: as of `StoredParams`, without the adapter.
    """

    def __init__(self, stored: StoredParams, adapter: AdapterConfig):
        self._stored, self._adapter = stored, adapter
        self.path = stored.path
        self.tensors = {
            name: info for name, info in stored.tensors.items() if ADAPTER not in name.split(".")
        }

    def read(self, name: str) -> np.ndarray:
        """The array of this dotted path, merged; see `StoredParams.read`."""
        array, place = self._stored.read(name), name.removesuffix("kernel") + ADAPTER
        if f"{place}.A.kernel" not in self._stored.tensors:
            return array
        A, B = (jnp.asarray(self._stored.read(f"{place}.{side}.kernel")) for side in "AB")
        magnitude = None
        if f"{place}.magnitude" in self._stored.tensors:
            magnitude = jnp.asarray(self._stored.read(f"{place}.magnitude"))
        update = LowRankUpdate(A, B, self._adapter.scale, magnitude)
        return np.asarray(update.merged(jnp.asarray(array)))

    def damage(self) -> list[str]:
        return self._stored.damage()


class NativeCheckpoint:
    """A native checkpoint to read from. No array is read before it is asked for.

    Attributes:
      directory: where it is.
      config: the architecture.
      compute: how the model computes.
      adapter: of the run that it is of, merged into the parameters.
      stored: its parameters on the disk.

    Raises:
      HymbaError: there is no such checkpoint, or it cannot be read.
    """

    def __init__(self, directory: Path, step: int | None = None):
        self.directory = directory
        self.config, self.compute = read_model_directory(directory, step)
        params = params_path(directory, step)
        assert isinstance(params, Path)
        self.adapter = read_trainable(directory).adapter
        self._all = StoredParams(params)
        self.stored = AdaptedParams(self._all, self.adapter) if self.adapter else self._all

    @cached_property
    def shapes(self) -> dict[ParamPath, tuple[int, ...]]:
        """Of every parameter that the config asks for, by path."""
        return param_shapes(self.config, scan_layers=self.compute.scan_layers)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Dtype and shape of every stored array, by its dotted path."""
        return self.stored.tensors

    @cached_property
    def hf_slices(self) -> list[HFSlice]:
        """Of the parameters. Raises HymbaError if HF checkpoints have no such architecture."""
        return hf_slices(self.shapes, self.config, scan_layers=self.compute.scan_layers)

    def problems(self) -> list[str]:
        """Every array that does not fit the config, in words, without reading any."""
        shapes = param_shapes(
            self.config, scan_layers=self.compute.scan_layers, adapter=self.adapter
        )
        return mismatches(
            self._all.tensors, {dotted(path): shape for path, shape in shapes.items()}
        )

    def damage(self) -> list[str]:
        """Reads all arrays and, of a run's checkpoint, what resuming needs; what is missing or
        damaged, in words."""
        problems, checkpoint = self.stored.damage(), self.stored.path.parent
        if checkpoint == self.directory.absolute():  # a standalone model
            return problems
        return [*problems, *_damage(checkpoint / OPTIMIZER), *_damage(checkpoint / LOOP)]

    def check(self) -> None:
        """Raises ConversionError naming every array that cannot be converted."""
        problems = self.problems()
        if not problems:
            dtypes = defaultdict(set)
            for part in self.hf_slices:
                dtypes[part.name].add(self.tensors[dotted(part.path)].dtype)
            problems = [
                f"the parts of {name} have several dtypes, {', '.join(sorted(several))}"
                for name, several in dtypes.items()
                if len(several) > 1
            ]
        if problems:
            raise ConversionError(
                f"{self.stored.path}: parameters and {CONFIG_FILE} do not fit: "
                + "; ".join(problems)
            )


def _damage(part: Path) -> list[str]:
    """What is missing or damaged of the optimizer state or the loop state of a checkpoint."""
    if not part.is_dir():
        return [f"{part}: is missing"]
    try:
        if part.name == OPTIMIZER:
            return StoredParams(part).damage()
        read_loop(part)
    except HymbaError as error:
        return [str(error)]
    return []
