"""How the devices of a run share its work."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from hymba_jax.config.field_types import type_problems
from hymba_jax.errors import HymbaError


@dataclass(frozen=True)
class ParallelConfig:
    """The axes of the device mesh. One may be -1: all remaining devices.

    Attributes:
      data: data-parallel groups, each of which holds all parameters.
      fsdp: shards of a group's batch, and of every parameter and its optimizer state.
      sequence: shards of each sequence, meta tokens included.
      tensor: shards of each layer's width, which work on the same sequences.

    Raises:
      HymbaError: naming every invalid size.
    """

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._value_problems()]
        if problems:
            raise HymbaError("parallel config: " + "; ".join(problems))

    def _value_problems(self) -> Iterator[str]:
        sizes = asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                yield f"{name} is {size}, not at least 1, nor -1 for all remaining devices"
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            yield f"{' and '.join(rest)} are -1, only one may be"

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The size of each axis on so many devices.

        Raises:
          HymbaError: the sizes do not fit the number of devices.
        """
        sizes = asdict(self)
        product = math.prod(size for size in sizes.values() if size != -1)
        rest, left = divmod(num_devices, product)
        if left or (-1 not in sizes.values() and rest != 1):
            wanted = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != -1)
            multiple = " times an integer" if -1 in sizes.values() else ""
            raise HymbaError(
                f"parallel config: {wanted}{multiple} is not the number of devices, {num_devices}"
            )
        return {name: rest if size == -1 else size for name, size in sizes.items()}
