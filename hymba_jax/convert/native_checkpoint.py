"""A native checkpoint, of a standalone model or of a training run, to convert or to inspect."""

from collections import defaultdict
from functools import cached_property
from pathlib import Path

from hymba_jax.checkpoint.checkpoints import OPTIMIZER, Step, params_path
from hymba_jax.checkpoint.checksums import dotted
from hymba_jax.checkpoint.model_file import read_model
from hymba_jax.config.run import CONFIG_FILE
from hymba_jax.convert.mapping import ConversionError, HFSlice, hf_slices, mismatches
from hymba_jax.convert.params_stream import StoredParams
from hymba_jax.convert.tensor_file import TensorInfo
from hymba_jax.model.abstract import ParamPath, param_shapes


class NativeCheckpoint:
    """A native checkpoint to read from. No array is read before it is asked for.

    Attributes:
      directory: where it is.
      config: the architecture.
      compute: how the model computes.
      stored: its parameters on the disk.

    Raises:
      HymbaError: there is no such checkpoint, or it cannot be read.
    """

    def __init__(self, directory: Path, step: Step | None = None):
        self.directory = directory
        self.config, self.compute = read_model(directory / CONFIG_FILE)
        self.stored = StoredParams(params_path(directory, step))

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
        return mismatches(
            self.tensors, {dotted(path): shape for path, shape in self.shapes.items()}
        )

    def damage(self) -> list[str]:
        """Reads all arrays, also a run's optimizer state, and names those whose checksums
        differ."""
        optimizer = self.stored.path.parent / OPTIMIZER
        others = [StoredParams(optimizer)] if optimizer.is_dir() else []
        return [problem for stored in (self.stored, *others) for problem in stored.damage()]

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
