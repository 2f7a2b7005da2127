"""Starts the real command in several processes that meet over loopback."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from entry.command import REPOSITORY, environment


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


type Where = tuple[list[str], dict[str, str]]
"""Options and environment of a process that say where the others are."""


def addresses(count: int) -> list[Where]:
    """Explicit addresses."""
    options = ["--distributed.coordinator", f"127.0.0.1:{free_port()}"]
    options += ["--distributed.num-processes", str(count), "--distributed.process-id"]
    return [([*options, str(i)], {}) for i in range(count)]


def slurm(count: int) -> list[Where]:
    """What srun says to each process."""
    common = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count)}
    common["JAX_COORDINATOR_PORT"] = str(free_port())
    own = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]
    return [([], {**common, **variables}) for variables in own]


def start(
    options: list[str],
    devices: int,
    cache: Path,
    variables: dict[str, str] | None = None,
    program: str = "train.py",
) -> subprocess.Popen[str]:
    """One process of a run."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, program, *options],
        env={
            **environment(cache),
            **(variables or {}),
            "XLA_FLAGS": flags,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        },
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes: list[subprocess.Popen[str]], within: float = 300) -> list[Ended]:
    """How they end; all have to in so many seconds, and are killed if they do not."""
    deadline = time.monotonic() + within
    try:
        ended = []
        for process in processes:
            stdout, stderr = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            ended.append(Ended(process.returncode, spoken(stdout), stderr))
        return ended
    finally:
        for process in processes:
            process.kill()


def spoken(stdout: str) -> str:
    """Without what the CPU's collectives print when they connect."""
    return "".join(line for line in stdout.splitlines(True) if not line.startswith("[Gloo]"))
