"""Whether a training state can fit the memory of its devices, before any of it is allocated."""

from jax.sharding import Mesh

from hymba_jax.checkpoint.train_state import AbstractTrainState
from hymba_jax.errors import HymbaError
from hymba_jax.host import host_memory
from hymba_jax.model.abstract import Params
from hymba_jax.parallel.memory import device_memory
from hymba_jax.parallel.mesh import bytes_per_device


def check_memory(abstract: AbstractTrainState, mesh: Mesh, teacher: Params | None = None) -> None:
    """Refuses a state that is larger than all the memory that its devices have.

    Gradients and activations are not considered: `hymba compile` reports them.

    Args:
      teacher: shapes of parameters that are there beside it.

    Raises:
      HymbaError: naming both sizes and what to change.
    """
    needed = bytes_per_device((abstract.state, teacher))
    available = device_memory(mesh.local_devices)
    if available is None or needed <= available:
        return
    device = mesh.local_devices[0]
    change = "choose a smaller model"
    share = ""
    if device.platform == "cpu":
        share = f", its share of {host_memory() / 1e9:,.1f} GB of host memory"
    else:
        change += ", or shard it over more devices by parallel.fsdp"
    state = f"{abstract.num_params:,} parameters and their optimizer state"
    if teacher is not None:
        state += ", beside the teacher's parameters,"
    raise HymbaError(
        f"{state} take {needed / 1e9:,.1f} GB on each device, and a {device.device_kind} has "
        f"{available / 1e9:,.1f} GB{share}: {change}"
    )
