"""What every benchmark shares: a clock, a compiler's account of memory, a table."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console, JustifyMethod
from rich.table import Table

Row = dict[str, str | int | float]


def median_ms(
    call: Callable[[], Any], *, warmup: int = 2, repeats: int = 10, together: int = 1
) -> float:
    """Median wall-clock milliseconds of `call`, waiting for the arrays it returns.

    Args:
      together: calls that are begun before the last one is waited for, and share its time.
    """
    times = []
    for i in range(warmup + repeats):
        start = time.perf_counter()
        for _ in range(together):
            arrays = call()
        jax.block_until_ready(arrays)
        if i >= warmup:
            times.append(1e3 * (time.perf_counter() - start) / together)
    return statistics.median(times)


def short_ms(call: Callable[[], Any], *, warmup: int = 2, repeats: int = 10) -> float:
    """The same of short calls: an accelerator gets the next ones while it computes."""
    together = 1 if jax.default_backend() == "cpu" else 20
    return median_ms(call, warmup=warmup, repeats=repeats, together=together)


def measure(
    function: Callable[..., Any], *arguments: Any, warmup: int = 2, repeats: int = 10
) -> tuple[float, float]:
    """Milliseconds a call of the jitted function, and the MB of temporaries it was compiled to."""
    compiled = jax.jit(function).lower(*arguments).compile()
    milliseconds = short_ms(lambda: compiled(*arguments), warmup=warmup, repeats=repeats)
    memory: Any = compiled.memory_analysis()
    return milliseconds, memory.temp_size_in_bytes / 1e6


def peak_bytes() -> int:
    """The most memory that this process had at once: of its device, on CPUs of the host."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_in_subprocess(script: str, arguments: Sequence[str]) -> Row:
    """The row that a script writes with `--row --json FILE`, in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "row.json")
        subprocess.run([sys.executable, script, *arguments, "--row", "--json", file], check=True)
        row: Row = json.loads(file.read_text())
        return row


def report(title: str, rows: Sequence[Row], json_file: Path | None = None) -> None:
    """Prints the rows as a table under the hardware they were measured on; `json_file` gets
    them too, one JSON object a line."""
    device = jax.devices()[0]
    table = Table(title=title, caption=f"{device.device_kind}, {os.cpu_count()} CPU cores")
    columns = {name: value for row in rows for name, value in row.items()}
    for name, value in columns.items():
        justify: JustifyMethod = "left" if isinstance(value, str) else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(_shown(row.get(name, "")) for name in columns))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has room for every column
    console.print(table)
    if json_file is not None:
        write_json(rows, json_file)


def _shown(value: str | int | float) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def write_json(rows: Sequence[Row], file: Path) -> None:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
