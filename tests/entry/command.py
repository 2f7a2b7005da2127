"""Runs the real commands, on a model that compiles in seconds and a corpus of a few pages."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
HYMBA = Path(sys.executable).with_name("hymba")

CONFIG = """
output = "{output}"

[model]
hidden_size = 16
mlp_size = 32
layers = "{layers}"
num_meta_tokens = 4
max_positions = 64

[model.attention]
num_heads = 2
num_kv_heads = 1
window = 8

[data]
path = "{corpus}"
tokenizer = "bytes"
sequence_length = 24
validation_fraction = 0.25

[training]
steps = 4
batch_size = 8
log_every = 1
validate_every = 3
validation_sequences = 8
checkpoint_every = 2
sample_prompt = "the"
sample_tokens = 8
"""


def write_config(directory: Path, output: Path, layers: str = "L") -> Path:
    """A corpus and a config for it, below `directory`.

    Args:
      layers: attention alone compiles in half the time of hybrid layers.
    """
    corpus = directory / "corpus"
    corpus.mkdir(exist_ok=True)
    words = ["a ", "red ", "hat ", "and ", "the ", "old ", "dog ", "ran. ", "Who ", "sat? "]
    for i in range(12):
        text = "".join(random.Random(i).choices(words, k=200))
        (corpus / f"page{i}.txt").write_text(text)
    path = directory / "config.toml"
    path.write_text(CONFIG.format(output=output, corpus=corpus, layers=layers))
    return path


def environment(cache: Path) -> dict[str, str]:
    """One CPU device, and programs compiled quickly (see tests/conftest.py) and kept for all."""
    return {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "NO_COLOR": "1",
    }


def run(
    command: list[str | Path], cache: Path, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; `prefix` is a shell command line that comes before it."""
    return subprocess.run(
        [*prefix, *map(str, command)],
        env=environment(cache),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def train_py(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "train.py", *arguments]


def read_metrics(output: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without its times, which no two runs share."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("tokens_per_second") >= line.pop("tokens_per_second_per_device") > 0
        assert line.pop("input_seconds") >= 0
        assert line.pop("checkpoint_seconds") >= 0
    return lines
