"""The slowest process of a run, found without waiting for the devices or for one another."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class SlowestProcess:
    """Compares how long the processes took.

    The devices gather the times after what they were given before; a single process has none.
    Every process must call `submit` equally often.
    """

    def __init__(self) -> None:
        self._gathered: jax.Array | None = None

    def submit(self, seconds: float) -> None:
        """Gives the time of this process, to be compared with that of the others."""
        if jax.process_count() == 1:
            return
        mesh = Mesh(np.array(jax.devices()), ("device",))
        own = jax.make_array_from_callback(
            (mesh.size,),
            NamedSharding(mesh, PartitionSpec("device")),
            lambda _: np.full(1, seconds, np.float32),
        )
        self._gathered = jax.jit(_gather, out_shardings=NamedSharding(mesh, PartitionSpec()))(own)

    def read(self) -> tuple[int, float] | None:
        """The index of the slowest process and its seconds, of the last `submit` since the last
        call, which it waits for; None if there was none."""
        if self._gathered is None:
            return None
        seconds, self._gathered = np.asarray(self._gathered), None
        slowest = int(seconds.argmax())
        return jax.devices()[slowest].process_index, float(seconds[slowest])


def _gather(numbers: jax.Array) -> jax.Array:
    return numbers
