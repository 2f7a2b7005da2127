"""Whether a training state can fit the memory of its devices, before any of it is allocated."""

from jax.sharding import Mesh

from hymba_jax.checkpoint.train_state import AbstractTrainState
from hymba_jax.errors import HymbaError
from hymba_jax.host import available_memory
from hymba_jax.model.abstract import Params
from hymba_jax.parallel.memory import device_memory
from hymba_jax.parallel.mesh import bytes_per_device


def check_memory(abstract: AbstractTrainState, mesh: Mesh, teacher: Params | None = None) -> None:
    """Refuses a state that is, with its gradients, larger than the memory that its devices have.

    On CPUs that is what other programs leave of the host's. Gradients are counted in the dtype of
    their parameters. Activations are not considered: `hymba compile` reports them.

    Args:
      teacher: shapes of parameters that are there beside it.

    Raises:
      HymbaError: naming both sizes and what to change.
    """
    gradients, _ = abstract.trainable.split(abstract.state.params)
    needed = bytes_per_device((abstract.state, gradients, teacher))
    devices = mesh.local_devices
    change, share = "choose a smaller model", ""
    if devices[0].platform == "cpu":
        of_host = available_memory()
        share = f", its share of {of_host / 1e9:,.1f} GB of available host memory"
        available: int | None = of_host // len(devices)
    else:
        change += ", or shard it over more devices by parallel.fsdp"
        available = device_memory(devices)
    if available is None or needed <= available:
        return
    state = f"{abstract.num_params:,} parameters, their gradients and optimizer state"
    if teacher is not None:
        state += ", beside the teacher's parameters,"
    raise HymbaError(
        f"{state} take {needed / 1e9:,.1f} GB on each device, and a {devices[0].device_kind} has "
        f"{available / 1e9:,.1f} GB{share}: {change}"
    )
