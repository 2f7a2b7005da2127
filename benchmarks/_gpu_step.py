"""A step of `on_gpu.py` in its own process: results are written as they arrive.

python benchmarks/_gpu_step.py MODULE:FUNCTION[:ARGUMENT] --limit SECONDS --rows FILE --profile FILE
"""

import argparse
import faulthandler
import gzip
import json
import math
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData, ProfileOptions

type Row = dict[str, Any]

LARGEST_PROFILE = 16 * 2**20  # bytes, compressed: the largest file that is copied back
BUSIEST = 12  # operations listed of a profile


class Recorder:
    """A step's cases: each is a row, and one that fails does not stop the next.

    Args:
      rows: file for the rows, one JSON object a line.
      profile: file for the step's profile, compressed.
      dry_run: use tiny sizes.

    Attributes:
      failed: a case has.
    """

    def __init__(self, rows: Path, profile: Path, *, dry_run: bool):
        self.dry_run, self.failed = dry_run, False
        self._rows, self._profile = rows, profile

    @contextmanager
    def case(self, name: str) -> Iterator[Row]:
        """A row to fill. An exception, or a number that is not finite, fails it."""
        print(f"{name} ...", flush=True)
        row: Row = {}
        start = time.perf_counter()
        try:
            yield row
            if odd := [key for key, value in row.items() if not _is_finite(value)]:
                raise FloatingPointError(f"not finite: {', '.join(odd)}")
            row = {"case": name, "passed": True, **row}
        except Exception as error:  # recorded; the next case may pass
            traceback.print_exc()
            self.failed = True
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            kept = {key: value if _is_finite(value) else str(value) for key, value in row.items()}
            row = {"case": name, "passed": False, "error": reason, **kept}
        row["seconds"] = time.perf_counter() - start
        with self._rows.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def profile(self, call: Callable[[], Any], times: int = 3) -> None:
        """Traces a few calls: their busiest operations make a row, the trace a file.

        XProf shows it: `gunzip`, then move it to `DIR/plugins/profile/one/host.xplane.pb` and
        start `xprof --logdir DIR`.
        """
        options = ProfileOptions()
        options.python_tracer_level = 0
        options.host_tracer_level = 1
        with self.case("profile") as row, tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory, profiler_options=options):
                for _ in range(times):
                    arrays = call()
                jax.block_until_ready(arrays)
            (trace,) = Path(directory).rglob("*.xplane.pb")
            content = gzip.compress(trace.read_bytes())
            row |= {"calls": times, "MB": len(content) / 1e6, "file": self._profile.name}
            if len(content) > LARGEST_PROFILE:
                row["file"] = "not kept, too large"
            else:
                self._profile.write_bytes(content)
            row |= busiest(trace)


def busiest(trace: Path) -> Row:
    """Milliseconds that the device's streams were busy in a trace, and the operations they were
    busy with; on a CPU, what its threads did."""
    planes = [*ProfileData.from_file(str(trace)).planes]
    planes = [p for p in planes if p.name.startswith("/device:GPU")] or planes
    milliseconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for plane in planes:
        lines = [*plane.lines]
        for line in [v for v in lines if v.name.startswith("Stream")] or lines:
            for event in line.events:
                milliseconds[event.name] += event.duration_ns / 1e6
                calls[event.name] += 1
    return {
        "busy ms": float(milliseconds.total()),
        "busiest": [
            {"operation": name[:120], "calls": calls[name], "ms": spent}
            for name, spent in milliseconds.most_common(BUSIEST)
        ],
    }


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def main() -> int:
    """Runs a step; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    # Logs the stack traces of hangs and crashes.
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(options.limit - 2, 0.1))
    recorder = Recorder(options.rows, options.profile, dry_run=options.dry_run)
    module, name, *argument = options.function.split(":")
    getattr(import_module(module), name)(recorder, *argument)
    return int(recorder.failed)


if __name__ == "__main__":
    sys.exit(main())
