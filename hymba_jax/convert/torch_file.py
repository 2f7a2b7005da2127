"""PyTorch's own files (`pytorch_model.bin`), where torch is installed."""

from pathlib import Path
from typing import Any

import numpy as np

from hymba_jax.convert.tensor_file import TensorInfo
from hymba_jax.errors import HymbaError
from hymba_jax.files import open_regular


class TorchFile:
    """A file that `torch.save` wrote, to read from; its tensors are memory-mapped.

    Attributes:
      tensors: what the file holds, by name.

    Raises:
      HymbaError: torch is not installed, or the file holds more than tensors.
    """

    def __init__(self, path: Path):
        try:
            import torch
        except ImportError as error:
            raise HymbaError(
                f"{path}: a pickle, which only torch can read safely, and torch is not installed: "
                "pip install torch, or get the checkpoint's .safetensors"
            ) from error
        with open_regular(path):  # torch would wait for a FIFO's writer
            pass
        try:
            # weights_only: a pickle can run any program, this mode only builds tensors.
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError:
            raise
        except Exception as error:  # torch has many types
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise HymbaError(
                f"{path}: torch cannot read it ({reason}): get it again, or the checkpoint's "
                ".safetensors"
            ) from error
        if not isinstance(held, dict) or not all(
            isinstance(name, str) and torch.is_tensor(value) for name, value in held.items()
        ):
            raise HymbaError(f"{path}: holds more than tensors by name, so it is not a checkpoint")
        self._bits = {2: torch.int16, 4: torch.int32}
        self._held: dict[str, Any] = held
        self.tensors = {
            name: TensorInfo(str(value.dtype).removeprefix("torch."), tuple(value.shape))
            for name, value in held.items()
        }

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a tensor, read when it is used."""
        value = self._held[name]
        bits = value.detach().contiguous().view(self._bits[value.element_size()]).numpy()
        return bits.view(self.tensors[name].dtype)[index]  # torch gives NumPy no bfloat16
