"""Kills a small run at random moments, and compares it with one that was left alone.

    python benchmarks/soak.py --kills 200

The run has three stages, of pretraining or (--recipe fine-tuning) SFT-1, SFT-2 and DPO, and saves
and evaluates all the time. Each time a SIGKILL, SIGTERM or
Ctrl-C comes, after which the same command resumes. A run that ends has to have the same parameters,
optimizer state, metrics and sample, bit for bit; then the next one begins, until there were as many
kills. SIGTERM and Ctrl-C have to end it within 30 seconds and say so; the longest time is reported.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro

from hymba_jax import (
    cli,
    train,  # noqa: F401, imported once for all attempts
)
from hymba_jax.run_files import FOLDER, checkpoint_steps

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from entry.command import write_config

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LIMIT = 30  # seconds from a signal to the end
POLL = 0.005  # seconds between looks at a process
TIMES = ("second", "seconds", "second_per_device")  # ends of the metrics that no two runs share

# Of a run: `write_config` has the model, the corpus and what is not named here.
OPTIONS = {
    "training.log-every": 4,
    "training.validate-every": 7,
    "training.validation-sequences": 16,
    "training.checkpoint-every": 5,
    "training.keep-checkpoints": 1,
    "training.sample-tokens": 4,
}
PRETRAINING = """
[[stages]]
name = "stable"
steps = 25
schedule = "constant"

[[stages]]
name = "decay"
steps = 20
schedule = "linear"
batch_size = 4

[[stages]]
name = "longer"
steps = 15
batch_size = 4
sequence_length = 48
max_positions = 128
"""
CHATS = """
format = "chat"
chat_template = "{template}"
packing = "documents"
validation_packing = "documents"
sequence_length = 64

[data.sources.reasoning]
path = "{directory}/reasoning.jsonl"

[data.sources.instructions]
path = "{directory}/instructions.jsonl"

[data.sources.preferences]
path = "{directory}/preferences.jsonl"
format = "preference"
"""
FINE_TUNING = """
[[stages]]
name = "sft-1"
steps = 15
schedule = "cosine"
sources.reasoning.weight = 1

[[stages]]
name = "sft-2"
steps = 15
schedule = "constant"
sources.instructions.weight = 2
sources.reasoning.weight = 1

[[stages]]
name = "dpo"
objective = "dpo"
steps = 25
batch_size = 4
schedule = "linear"
sources.preferences.weight = 1
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to do.

    Attributes:
      kills: signals to send.
      seed: of the moments and the signals.
      layers: of the model.
      recipe: of the run.
    """

    kills: int = 200
    seed: int = 0
    layers: str = "W"
    recipe: Literal["pretraining", "fine-tuning"] = "pretraining"


def write_recipe(directory: Path, options: Options) -> Path:
    """The config of the run, with what it reads below `directory`."""
    path = write_config(directory, directory / "alone", options.layers)
    config = path.read_text().replace("\nsteps = 4\n", "\n")
    if options.recipe == "pretraining":
        path.write_text(config + PRETRAINING)
        return path
    words = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx"]
    prompts = [first + second for first in words for second in words[:5]]
    sources: dict[str, dict[str, Callable[[str], str]]] = {
        "reasoning": {"completion": str.capitalize},
        "instructions": {"completion": str.upper},
        "preferences": {"chosen": str.upper, "rejected": str.title},
    }
    for name, answers in sources.items():
        records = (
            {"prompt": prompt} | {field: answer(prompt) for field, answer in answers.items()}
            for prompt in prompts
        )
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(lines)
    template = Path(__file__).parents[1] / "configs" / "chat.jinja"
    chats = CHATS.format(template=template, directory=directory)
    for line in (f'path = "{directory / "corpus"}"\n', "sequence_length = 24\n"):
        config = config.replace(line, "")
    data, training, rest = config.partition("\n[training]")
    path.write_text(data + chats + training + rest + FINE_TUNING)
    return path


def fork(function: Callable[[], None], log: Path) -> int:
    """The id of a process that runs a function as a program, with its output in a file.

    It has all that this process has imported, which takes longer than most attempts. This process
    itself must not use JAX, whose threads do not survive.
    """
    sys.stdout.flush()
    if process := os.fork():
        return process
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    status = 0
    try:
        function()
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        status = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Run:
    """A run in a directory, in one attempt or many."""

    def __init__(self, config: Path, output: Path):
        self.output, self.log = output, output.with_suffix(".log")
        self._arguments = ["--config", str(config), "--output", str(output)]
        for name, value in OPTIONS.items():
            self._arguments += [f"--{name}", str(value)]

    def start(self) -> int:
        """The id of the process of an attempt."""
        return fork(partial(cli.train, self._arguments), self.log)

    @property
    def lines(self) -> int:
        """How many lines the attempt has printed."""
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0

    def finish(self) -> list[float]:
        """Runs an attempt to its end; the seconds before each of its lines."""
        process, times = self.start(), [time.monotonic()]
        while (status := wait(process, 0)) is None:
            times += [time.monotonic()] * (self.lines + 1 - len(times))
            time.sleep(POLL)
        check(status, self.log)
        return [after - before for before, after in pairwise(times)]

    def arrays(self) -> dict[str, np.ndarray]:
        """Those of the newest checkpoint, as Orbax reads them."""
        found = {}
        path = self.output / FOLDER / str(checkpoint_steps(self.output)[-1])
        for part in ("params", "optimizer"):
            tree = ocp.StandardCheckpointHandler().restore(path / part)
            for name, leaf in jax.tree.leaves_with_path(tree):
                found[f"{part}{jax.tree_util.keystr(name)}"] = np.asarray(leaf)
        return found

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics, without times."""
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [
            {name: value for name, value in json.loads(line).items() if not name.endswith(TIMES)}
            for line in lines
        ]

    def sample(self) -> str:
        return (self.output / "sample.txt").read_text()


def compare(run: Run, other: Run) -> None:
    """Exits with what two runs do not have in common, if there is anything."""
    arrays, others = run.arrays(), other.arrays()
    names = [name for name in arrays.keys() | others.keys() if not same(name, arrays, others)]
    different = [f"{len(names)} arrays, such as {names[0]}"] if names else []
    different += ["metrics"] * (run.metrics() != other.metrics())
    different += ["sample"] * (run.sample() != other.sample())
    if different:
        sys.exit(f"different: {'; '.join(different)}")


def same(name: str, arrays: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> bool:
    """Whether both have an array of this name, with the same bits."""
    pair = [each[name].tobytes() for each in (arrays, others) if name in each]
    return len(pair) == 2 and pair[0] == pair[1]


def check(status: int | None, log: Path) -> None:
    """Exits with the output of a process that failed."""
    if status != 0:
        sys.exit(f"exit status {status}:\n{log.read_text()}")


def wait(process: int, seconds: float) -> int | None:
    """The exit status of a process, minus the signal that killed it; None if it runs longer."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL)


def kill(run: Run, number: signal.Signals, lines: int, delay: float) -> float | None:
    """Sends a signal to an attempt some time after it has printed so many lines.

    Returns the seconds that the attempt took to end, or None if it had ended before.
    """
    run.log.unlink(missing_ok=True)
    process = run.start()
    while (status := wait(process, POLL)) is None and run.lines < lines:
        pass
    status = wait(process, delay) if status is None else status
    if status is not None:
        check(status, run.log)
        return None
    was_starting = run.lines == 0  # Python raises KeyboardInterrupt, which destructors may swallow
    os.kill(process, number)
    began = time.monotonic()
    status = wait(process, LIMIT)
    seconds = time.monotonic() - began
    if status is None:
        os.kill(process, signal.SIGKILL)
        wait(process, LIMIT)
        if was_starting:
            return 0.0
        sys.exit(f"{number.name} did not end the run in {LIMIT} s:\n{run.log.read_text()}")
    if status == -signal.SIGKILL or (was_starting and status in (-number, 128 + number)):
        return 0.0
    if status == 128 + number and "stopped by" in run.log.read_text():
        return seconds
    check(status, run.log)
    return None


def soak(directory: Path, options: Options) -> Counter[str]:
    """Kills runs and compares them; how many of which signals came, and runs ended."""
    config = write_recipe(directory, options)
    alone, run = Run(config, directory / "alone"), Run(config, directory / "killed")
    gaps = alone.finish()
    rng, counts, longest = random.Random(options.seed), Counter[str](), 0.0
    while counts["kills"] < options.kills or run.output.exists():
        enough = counts["kills"] >= options.kills
        # Within a quarter of a run after the start, which is all over the run as it gets on.
        number, line = rng.choice(SIGNALS), rng.randrange(len(gaps) // 4 + 3)
        delay = rng.uniform(0, gaps[line])
        seconds = kill(run, number, sys.maxsize if enough else line, delay)
        if seconds is not None:
            longest = max(longest, seconds)
            counts.update(["kills", number.name])
            continue
        log = directory / "compare.log"
        check(wait(fork(partial(compare, run, alone), log), 600), log)
        counts["runs"] += 1
        print(f"{counts['kills']} kills, run {counts['runs']} is equal", flush=True)
        shutil.rmtree(run.output)
    print(f"longest time from SIGTERM or Ctrl-C to the end: {longest:.1f} s")
    return counts


def main(args: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, args=args, description=__doc__)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{directory}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        counts = soak(Path(directory), options)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
