"""Reports in one line that another process of the run was lost, in place of JAX's forty.

JAX aborts the remaining processes from an XLA thread, which Python cannot catch. So their standard
error is piped through this program, which outlives them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from hymba_jax.errors import HymbaError
from hymba_jax.run_files import checkpoint_steps

# What XLA's coordination service logs before it aborts, and what it aborts with.
_ABORT_LOG = re.compile(rb"[EF]\d{4} .*(coordination_service|JAX distributed service detected)")
_STDERR = 2
_ABORT_MESSAGE = "the JAX distributed service detected fatal errors"


def watch_stderr(output: str, where: str, seconds: int) -> None:
    """Filters this process's standard error, replacing JAX's messages about a lost process.

    Args:
      output: the run directory; empty for a command that has none.
      where: the coordinator's address, if it is known.
      seconds: the timeout.
    """
    # In its own session, so that interrupts do not reach it; it ends at the end of its input.
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


def explain(stderr_text: str, output: str, where: str, seconds: int) -> str:
    """The line for what JAX said when it aborted the process."""
    again = "start all processes again with the same command"
    if "RegisterTask" in stderr_text and "DEADLINE_EXCEEDED" in stderr_text:
        return (
            f"error: not all processes of the run connected{where} within {seconds} s: check the "
            f"output of the others, whether process 0 runs there and can be reached, then {again}"
        )
    if "RegisterTask" in stderr_text:
        return (
            f"error: another process has connected{where} with this process's id: give each "
            f"process its own id and each run its own port, then {again}"
        )
    name, rest = (f"{output}: ", f" {_what_follows(output)}") if output else ("", "")
    silent = re.search(r"stopped sending heartbeats\):\s*([\d, \n]*\d)", stderr_text)
    if silent:
        who = "process " + ", ".join(re.findall(r"\d+", silent[1]))
    elif "Failed to send RPC to coordination service" in stderr_text:
        who = "process 0"
    else:
        who = "another process"
    return (
        f"error: {name}lost {who}, which stopped, was killed or cannot be reached: check "
        f"its output, then {again}{rest}"
    )


def _what_follows(output: str) -> str:
    try:
        steps = checkpoint_steps(output)
    except HymbaError:  # a bucket that cannot be reached, perhaps for what stopped the run
        return "to resume from the newest checkpoint"
    return f"to resume from step {steps[-1]}" if steps else "to start from scratch"


def main() -> None:
    """Copies the standard input to the standard error until it ends."""
    output, where, seconds = sys.argv[1:]
    held: list[bytes] = []
    for line in sys.stdin.buffer:
        if held or _ABORT_LOG.match(line):
            held.append(line)
        else:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
    text = b"".join(held).decode(errors="replace")
    if _ABORT_MESSAGE in text:
        text = explain(text.partition(_ABORT_MESSAGE)[2], output, where, int(seconds)) + "\n"
    sys.stderr.write(text)
