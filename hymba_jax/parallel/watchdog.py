"""Says in one line what JAX says in forty: that another process of the run is gone.

JAX watches the processes of a run, and where one is lost it aborts the others from a thread of
XLA's, which Python cannot catch. So their standard error goes through a process of its own, this
program, which outlives them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from hymba_jax.run_files import checkpoint_steps

# What XLA's coordination service logs before it aborts, and what it aborts with.
_OMEN = re.compile(rb"[EF]\d{4} .*(coordination_service|JAX distributed service detected)")
_STDERR = 2
_VERDICT = "the JAX distributed service detected fatal errors"


def watch_stderr(output: str, where: str, seconds: int) -> None:
    """Lets this process's standard error through, but for JAX's words on a lost process.

    Args:
      output: the run directory.
      where: the address at which the processes meet, if it is known.
      seconds: how long they wait for one another.
    """
    # In a session of its own, where no interrupt reaches it: it ends when its input does.
    command = watcher_command(output, where, seconds)
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert watcher.stdin is not None
    os.dup2(watcher.stdin.fileno(), _STDERR)
    watcher.stdin.close()


def watcher_command(output: str, where: str, seconds: int) -> list[str]:
    """The command line of the process that the standard error goes through."""
    directory = str(Path(__file__).parents[2])
    # Isolated, and with the directory that holds this package last on the path: with -m or
    # PYTHONPATH a file of the user's that is named like a module of the standard library would be
    # run instead.
    program = f"import sys; sys.path.append({directory!r}); from {__name__} import main; main()"
    return [sys.executable, "-I", "-c", program, output, where, str(seconds)]


def explain(words: str, output: str, where: str, seconds: int) -> str:
    """The line for what JAX said when it aborted the process."""
    again = "start all processes again with the same command"
    if "RegisterTask" in words and "DEADLINE_EXCEEDED" in words:
        return (
            f"error: not all processes of the run met{where} within {seconds} s: look at what the "
            f"others say, whether process 0 runs there and can be reached, then {again}"
        )
    if "RegisterTask" in words:
        return (
            f"error: another process met the others{where} in place of this one: give each process "
            f"an id of its own and each run a port of its own, then {again}"
        )
    steps = checkpoint_steps(output)
    rest = f"to resume from step {steps[-1]}" if steps else "to start from scratch"
    silent = re.search(r"stopped sending heartbeats\):\s*([\d, \n]*\d)", words)
    if silent:
        who = "process " + ", ".join(re.findall(r"\d+", silent[1]))
    elif "Failed to send RPC to coordination service" in words:
        who = "process 0"
    else:
        who = "another process"
    return (
        f"error: {output}: lost {who}, which stopped, was killed or cannot be reached: look at "
        f"what it said, then {again} {rest}"
    )


def main() -> None:
    """Copies the standard input to the standard error until it ends."""
    output, where, seconds = sys.argv[1:]
    held: list[bytes] = []
    for line in sys.stdin.buffer:
        if held or _OMEN.match(line):
            held.append(line)
        else:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
    words = b"".join(held).decode(errors="replace")
    if _VERDICT in words:
        words = explain(words.partition(_VERDICT)[2], output, where, int(seconds)) + "\n"
    sys.stderr.write(words)
