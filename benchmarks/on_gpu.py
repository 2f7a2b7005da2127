"""GPU checks and benchmarks, the most important first, within a time limit.

python benchmarks/on_gpu.py --minutes 9 --json gpu/results.json

Each step runs in a process group of its own and is killed at its limit, so that whatever goes
wrong in one costs the others nothing but time. FILE is rewritten whenever a step has found
something: for each step its status (passed, failed, timed out, skipped), seconds, and the rows that
it has found; the end of its output where it did not pass. Beside FILE: a profile of each speed,
NAME.xplane.pb.gz, 16 MB at most. The exit status is 1 if a step failed or timed out.

Compiling takes most of the time, and what is compiled is kept: a second run on the same machine, or
with the `--cache DIR` of an earlier one, does not do it again (`--pack-cache` leaves DIR as
cache.tar beside FILE, if it is small). `--only STEP ...` runs what the first did not reach.

On a machine with one GPU and no network, with the wheels that JAX 0.12 needs in ./site:

PYTHONPATH=site python3 benchmarks/on_gpu.py --minutes 9 --json "$OUT/results.json"

`--dry-run` takes every step on a CPU at sizes where numbers say nothing.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # it need not be installed

from _isolated import run_isolated  # noqa: E402

from hymba_jax.files import replace_text  # noqa: E402

JAX = "0.12"  # what kernels and limits were tried with
MIN_STEP_SECONDS = 10.0  # seconds below which no step is begun: starting JAX takes as long
TAIL = 4000  # characters kept of the output of a step that did not pass
LARGEST_CACHE = 16 * 2**20  # bytes


class Step(NamedTuple):
    """A part of the run.

    Attributes:
      limit: seconds after which it is killed.
      function: what it runs, module:name or module:name:argument. It is imported in the step's own
        process, so that the others run if it cannot be.
      xla_flags: added to XLA_FLAGS.
    """

    name: str
    limit: float
    function: str
    xla_flags: str = ""


# Loops are in CUDA graphs: their conditions are evaluated on the GPU, not on the host.
LOOPS_IN_GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE"

STEPS = (
    Step("machine", 60, "_gpu_checks:machine"),
    Step("conforming scan", 80, "_gpu_checks:conforming_scan"),
    Step("conforming attention", 60, "_gpu_checks:conforming_attention"),
    Step("conforming norms and convolution", 60, "_gpu_checks:conforming_elementwise"),
    Step("conforming decoding", 40, "_gpu_checks:conforming_decoding"),
    Step("decoding layers", 60, "_gpu_checks:decoding_layers"),
    Step("conforming SSD", 60, "_gpu_checks:conforming_ssd"),
    Step("golden models", 60, "_gpu_checks:golden:tiny-ntk,tiny-wide"),
    Step("caches", 50, "_gpu_checks:caches"),
    Step("scan", 80, "_gpu_speed:scan"),
    Step("attention", 50, "_gpu_speed:attention"),
    Step("SSD", 50, "_gpu_speed:ssd_layer"),
    Step("train 125M", 100, "_gpu_speed:train:hymba_125m.toml"),
    Step("train 1.5B", 240, "_gpu_speed:train:hymba_1_5b.toml"),
    Step("decode 1", 120, "_gpu_speed:decode:1"),
    Step("decode 1 as a graph", 90, "_gpu_speed:decode:1", LOOPS_IN_GRAPHS),
    Step("decode 128", 120, "_gpu_speed:decode:128"),
    Step("more golden models", 90, "_gpu_checks:golden:tiny-shared,tiny-nometa,tiny-default-rope"),
)

type Result = dict[str, Any]
type Command = Callable[[Step, float, Path, Path], Sequence[str | Path]]
"""Of a step, the seconds that it gets, and the files for its rows and its profile."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all steps; returns the exit status."""
    options = _parse(arguments)
    if problem := wrong_jax():
        sys.exit(f"on_gpu.py: {problem}")
    # Leaving through `finally` ends the step that is running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.cache.mkdir(parents=True, exist_ok=True)

    def command(step: Step, limit: float, rows: Path, profile: Path) -> Sequence[str | Path]:
        program = Path(__file__).with_name("_gpu_step.py")
        dry_run = ("--dry-run",) if options.dry_run else ()
        limits = ("--limit", str(limit), "--rows", rows, "--profile", profile)
        return [sys.executable, program, step.function, *limits, *dry_run]

    seconds = 60 * options.minutes
    chosen = [step for step in STEPS if step.name in (options.only or (step.name,))]
    # A dry run has no GPU's time to share out, and a CPU may have other work.
    steps = [step._replace(limit=seconds) if options.dry_run else step for step in chosen]
    results = run_steps(steps, command, _environment(options), seconds, options.json)
    if options.pack_cache:
        print(pack(options.cache, options.json.with_name("cache.tar")))
    return 1 if {"failed", "timed out"} & {result["status"] for result in results} else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    # With the standard library alone: this has to run where packages are missing, and say so.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps (default: 9)")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="for the results")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[step.name for step in STEPS],
        metavar="STEP",
        help=", ".join(f"'{step.name}'" for step in STEPS),
    )
    parser.add_argument("--dry-run", action="store_true", help="every step, tiny, on the CPU")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=Path(tempfile.gettempdir(), "hymba_jax_on_gpu"),
        help="of compiled programs (default: %(default)s)",
    )
    parser.add_argument(
        "--pack-cache",
        action="store_true",
        help="leave it as cache.tar beside FILE, if it is small",
    )
    return parser.parse_args(arguments)


def wrong_jax() -> str | None:
    """What is wrong with the installed JAX, if anything is."""
    try:
        found = version("jax")
    except PackageNotFoundError:
        return f"JAX {JAX} is needed, and none is installed"
    if found.startswith(f"{JAX}."):
        return None
    return f"JAX {JAX} is needed, {found} is installed: put the folder of its wheels on PYTHONPATH"


def _environment(options: argparse.Namespace) -> dict[str, str]:
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "JAX_COMPILATION_CACHE_DIR": str(options.cache.resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    }
    if options.dry_run:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return environment


def run_steps(
    steps: Sequence[Step],
    command: Command,
    environment: dict[str, str],
    seconds: float,
    file: Path,
) -> list[Result]:
    """Runs steps one after the other, as far as the time goes, and writes what they find.

    Without the first step, which says what machine it is, the others are not begun.

    Args:
      seconds: for all of them.
      file: for the results; profiles go beside it.
    """
    deadline = time.monotonic() + seconds
    results: list[Result] = [{"step": step.name, "status": "to come"} for step in steps]

    def write() -> None:
        replace_text(file, json.dumps({"steps": results}, indent=1) + "\n")

    for step, result in zip(steps, results, strict=True):
        left = deadline - time.monotonic()
        if results[0]["status"] in ("failed", "timed out"):
            result |= {"status": "skipped", "reason": f"the step {steps[0].name} did not pass"}
        elif left < MIN_STEP_SECONDS:
            result |= {"status": "skipped", "reason": "no time is left"}
        else:
            flags = f"{environment.get('XLA_FLAGS', '')} {step.xla_flags}".strip()
            added = environment | ({"XLA_FLAGS": flags} if flags else {})
            _run_step(step, min(step.limit, left), command, added, file, result, write)
        write()
        print("\n".join(summary(result)), flush=True)
    return results


def _run_step(
    step: Step,
    limit: float,
    command: Command,
    environment: Mapping[str, str],
    file: Path,
    result: Result,
    write: Callable[[], None],
) -> None:
    """Runs a step and fills its result, which is written whenever there are new rows."""
    with tempfile.TemporaryDirectory() as directory:
        rows, log = Path(directory, "rows"), Path(directory, "log")
        profile = file.with_name(f"{step.name.replace(' ', '-')}.xplane.pb.gz")
        result |= {"status": "running", "limit": limit, "rows": []}

        def look() -> None:
            found = _read_rows(rows)
            if len(found) > len(result["rows"]):
                result["rows"] = found
                write()

        write()
        ended = run_isolated(
            command(step, limit, rows, profile),
            limit=limit,
            log=log,
            environment=environment,
            watch=look,
        )
        result["rows"] = _read_rows(rows)
        result["seconds"] = round(ended.seconds, 1)
        if ended.status is None:
            result["status"] = "timed out"
        else:
            result |= {"status": "failed" if ended.status else "passed", "exit": ended.status}
        if result["status"] != "passed":
            result["output"] = log.read_text(errors="replace")[-TAIL:]


def _read_rows(file: Path) -> list[Result]:
    """The whole lines of a file that a step may be writing to, or may never have begun."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def summary(result: Result) -> list[str]:
    """A step's lines on the terminal: how it ended, and each of its rows."""
    message = result.get("reason", f"{result.get('seconds')} s")
    lines = [f"{result['step']:22}{result['status']:10} {message}"]
    for row in result.get("rows", ()):
        values = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
            if name not in ("case", "passed", "busiest")
        ]
        lines.append(f"  {'ok  ' if row['passed'] else 'FAIL'} {row['case']}: {', '.join(values)}")
    if result.get("output"):
        lines.append("  ... " + "\n      ".join(result["output"].splitlines()[-5:]))
    return lines


def pack(directory: Path, file: Path) -> str:
    """Packs a folder if it is small; says what became of it."""
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    message = f"{directory}: {size / 1e6:.1f} MB of compiled programs"
    if size > LARGEST_CACHE:
        return f"{message}, too large to pack"
    shutil.make_archive(str(file.with_suffix("")), "tar", directory)
    return f"{message}, packed as {file}"


if __name__ == "__main__":
    sys.exit(main())
