"""A number that the processes of a run share at each step, without waiting for the devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class LargestOfProcesses:
    """The largest of the numbers that the processes gave in the call before; 0 in the first call.

    Every process must call it equally often, and gets the same. The devices find it between two
    steps, and it is read one call later, when they have the next step to do. A single process gets
    the number that it gives.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        mesh = Mesh(np.array(jax.devices()), ("device",))
        own = jax.make_array_from_callback(
            (mesh.size,),
            NamedSharding(mesh, PartitionSpec("device")),
            lambda _: np.full(1, number, np.int32),
        )
        before, self._pending = self._pending, _largest(own)
        return 0 if before is None else int(before)


@jax.jit
def _largest(numbers: jax.Array) -> jax.Array:
    return jnp.max(numbers)
