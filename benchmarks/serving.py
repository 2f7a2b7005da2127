"""Continuous batching on this machine: many clients at the same time against one after another.

python benchmarks/serving.py [--config configs/tiny.toml] [--clients 64] [--json FILE]

The server is `hymba serve` in a process of its own, with the model of a config and random weights,
which cost what trained ones do. The requests are those of `hymba bench-serve`, 16 to 64 words and
32 to 128 tokens, sampled at temperature 1: by one client, each after the one before, from a server
with one slot; and by all clients at once, from one with as many slots. The server's processor time
for a token, prefill included, depends least on what else the machine does.
"""

import asyncio
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from _report import Row, report
from flax import nnx

from hymba_jax.checkpoint.save import save_model
from hymba_jax.config import ComputeConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.model import Hymba
from hymba_jax.serving.bench import BenchConfig, measure, summarize
from hymba_jax.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      config: the TOML file of a run, whose model it is.
      clients: at the same time, a power of two; each sends two requests.
      decode_steps: as of `hymba serve`.
      alone: requests of the one client.
      context: tokens of each sequence.
    """

    config: Path = Path("configs/tiny.toml")
    clients: int = 64
    alone: int = 16
    context: int = 512
    decode_steps: int = 4
    json: Path | None = None


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        write_model(options.config, model)
        rows = [
            row(model, options, clients=1, requests=options.alone),
            row(model, options, clients=options.clients, requests=2 * options.clients),
        ]
    rates = [float(row["tokens/s"]) for row in rows]
    report(
        f"{options.clients} clients: {rates[1] / rates[0]:.1f} times the throughput",
        rows,
        options.json,
    )


def row(model: Path, options: Options, *, clients: int, requests: int) -> Row:
    """Tokens a second of so many clients, and how long they wait."""
    sizes = ["--context", str(options.context), "--slots", str(clients)]
    with server(model, *sizes, "--decode-steps", str(options.decode_steps)) as (url, process):
        config = BenchConfig(url, requests=requests, clients=clients)
        asyncio.run(measure(replace(config, requests=clients, seed=1)))  # warms the connections
        begun = processor_seconds(process)
        answers = asyncio.run(measure(config))
        seconds = processor_seconds(process) - begun
    measured = summarize(answers)
    waits = {
        f"{name} {p}": measured["ms"][name][p] for name in ("TTFT", "ITL") for p in ("p50", "p99")
    }
    return {
        "clients": clients,
        "requests": measured["completed"],
        "tokens/s": measured["completion_tokens_per_second"],
        "CPU ms/token": 1e3 * seconds / sum(answer.completion_tokens for answer in answers),
        **waits,
        "slowest, s": measured["ms"]["latency"]["max"] / 1e3,
    }


def write_model(config: Path, directory: Path) -> None:
    """The model of a run with random weights, and a tokenizer of its size."""
    run = RunConfig.from_toml(config)
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokenizer = build_tokenizer(run.data.tokenizer, (path.read_text() for path in library))
    shape = replace(
        run.model,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_ids[0],
        eos_token_id=tokenizer.eos_id,
    )
    save_model(directory, Hymba(shape, ComputeConfig(), nnx.Rngs(0)), tokenizer)


@contextmanager
def server(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The API's URL of a server that is ready, and its process."""
    command = [sys.executable, "-m", "hymba_jax", "serve", "--model", str(model), "--port", "0"]
    command += options
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"at (http://\S+): ready", line):
                    yield f"{found[1]}/v1", process
                    return
            raise SystemExit(f"{' '.join(command)} failed")
        finally:
            process.terminate()


def processor_seconds(process: subprocess.Popen[str]) -> float:
    """Of all threads of a process so far; Linux only."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main(tyro.cli(Options))
