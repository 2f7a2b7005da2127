"""How the processes of a run find one another."""

from collections.abc import Iterator
from dataclasses import dataclass

from hymba_jax.errors import HymbaError


@dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others of its run; not part of the run's config.

    Detected under SLURM, Open MPI and on TPU pods; elsewhere give all of the first three, or none
    for a single process.

    Attributes:
      coordinator: HOST:PORT of process 0, with a port that is free there.
      num_processes: number of processes in the run.
      process_id: number of this process, counted from 0.
      start_timeout: seconds to wait for all processes to start.
      heartbeat_timeout: seconds without a heartbeat after which a process is considered lost and
        the others end.

    Raises:
      HymbaError: naming every invalid value.
    """

    coordinator: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout: int = 60
    heartbeat_timeout: int = 30

    def __post_init__(self) -> None:
        problems = [*self._problems()]
        if problems:
            raise HymbaError("distributed config: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
            yield f"coordinator is {self.coordinator!r}, not HOST:PORT"
        if self.num_processes is not None and self.num_processes < 1:
            yield f"num_processes is {self.num_processes}, not at least 1"
        elif self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 1):
            if self.num_processes is None:
                yield f"process_id is {self.process_id}, but num_processes is not given"
            else:
                yield f"process_id is {self.process_id}, not from 0 to {self.num_processes - 1}"
        for name in ("start_timeout", "heartbeat_timeout"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}, not at least 1"

    @property
    def is_given(self) -> bool:
        """Whether it describes other processes."""
        return bool(self.coordinator) or (self.num_processes, self.process_id) != (None, None)
