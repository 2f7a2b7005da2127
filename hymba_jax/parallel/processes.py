"""Runs of several processes: initialization, agreement and shutdown."""

import importlib.util
import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint.multihost import get_barrier_sync_fn

from hymba_jax.config.distributed import DistributedConfig
from hymba_jax.errors import HymbaError
from hymba_jax.parallel.watchdog import watch_stderr

_MARGIN = 5  # seconds that JAX may need to tell the others of a lost process


def is_launched() -> bool:
    """Whether a launcher that JAX detects started several processes.

    Otherwise JAX is not initialized: a single process has nothing to wait for.
    """
    for count, sign in (
        ("SLURM_NTASKS", "SLURM_STEP_NODELIST"),  # the latter is set only by srun
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("MEGASCALE_NUM_SLICES", "MEGASCALE_COORDINATOR_ADDRESS"),  # slices of TPUs
    ):
        if sign in os.environ and os.environ.get(count, "1") != "1":
            return True
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):  # Kubernetes' hosts of a TPU slice
        return True
    # Google Cloud's own TPU hosts have it in their metadata. Importing JAX sets this variable on
    # hosts without TPUs.
    return importlib.util.find_spec("libtpu") is not None and "TPU_SKIP_MDS_QUERY" not in os.environ


@contextmanager
def distributed_session(config: DistributedConfig, output: str = "") -> Iterator[None]:
    """Joins the other processes before JAX uses a device; no-op for a single process.

    An exception inside ends the process immediately, and JAX then ends the others; a normal exit
    would wait for them, and they for it.

    Args:
      output: the run directory; empty for a command that has none.

    Raises:
      HymbaError: the processes cannot be initialized.
    """
    if not (config.is_given or is_launched()) or config.num_processes == 1:
        yield
        return
    if config.coordinator and config.process_id == 0:
        _check_port(config.coordinator)
    where = f" at {config.coordinator}" if config.coordinator else ""
    watch_stderr(output, where, config.start_timeout)
    # It would take SIGTERM away from training/interrupts.py, which says why.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator or None,
            config.num_processes,
            config.process_id,
            initialization_timeout=config.start_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise HymbaError(
            f"cannot connect the processes of the run ({str(error).partition('\n')[0]}): give "
            "distributed.coordinator, num_processes and process_id to each"
        ) from error
    try:
        yield
        wait_for_all("the end")  # a collective gives up before a long sample is written
        barrier("the end")
    except BaseException as error:
        if any(_may_be_lost_process(cause) for cause in _causes(error)):
            # If another process is lost, JAX says so by then, and aborts this one.
            time.sleep(config.heartbeat_timeout + _MARGIN)
        _end(error)


def is_main_process() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Waits until every process has reached this point."""
    multihost_utils.sync_global_devices(what)


def wait_for_all(what: str) -> None:
    """Waits, for days if need be, until every process has reached this point.

    Unlike `barrier` it uses no device, whose collectives give up after some minutes.
    """
    get_barrier_sync_fn()(key=what, timeout_ms=7 * 24 * 60 * 60 * 1000)


def require_agreement(settings: Mapping[str, Any]) -> None:
    """Raises HymbaError, in every process, unless all have the same settings.

    Args:
      settings: JSON values by the names that the message calls them.
    """
    found = gather(dict(settings))
    if different := "; ".join(disagreements(found)):
        raise HymbaError(
            f"the processes of the run differ: {different}: start all with "
            "the same command, packages and data"
        )


def gather(value: Any) -> list[Any]:
    """The JSON value of every process, in their order; each must call this."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - text.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(padded, sizes, strict=True)]


def disagreements(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every setting that is not the same in all processes, and who has which value.

    Args:
      found: the settings of each process.
    """
    for name in dict.fromkeys(name for settings in found for name in settings):
        holders = defaultdict(list)
        for process, settings in enumerate(found):
            holders[json.dumps(settings.get(name))].append(str(process))
        if len(holders) > 1:
            several = {value: "es" * (len(who) > 1) for value, who in holders.items()}
            yield f"{name} is " + " and ".join(
                f"{value} in process{several[value]} {', '.join(who)}"
                for value, who in holders.items()
            )


def _check_port(coordinator: str) -> None:
    """Raises HymbaError if the port is taken, since XLA would crash."""
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise HymbaError(
            f"distributed.coordinator is {coordinator}, but process 0 cannot listen on port "
            f"{port} ({error.strerror}): choose another"
        ) from error


def _may_be_lost_process(error: BaseException) -> bool:
    """Whether a failed collective can look like this; JAX raises some of Gloo's errors as
    ValueError."""
    return isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and "Gloo" in str(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _end(error: BaseException) -> NoReturn:
    """Reports an exception as Python would, and ends this process without waiting for any other."""
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    else:
        status = 1
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
