"""A run's bits per byte on held-out text, against general compressors on the same files.

python benchmarks/learning_curve.py runs/tiny [--picture FILE] [--json FILE]
"""

import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import tyro
from _report import Row, report

from hymba_jax.config.run import CONFIG_FILE, RunConfig
from hymba_jax.data.corpus import standard_library
from hymba_jax.data.manifest import VALIDATION
from hymba_jax.training.metrics import JSON_LINES


@dataclass(frozen=True)
class Args:
    """Draws a run's learning curve.

    Attributes:
      run: the run directory.
      picture: where the picture goes.
      json: file for the rows as JSON lines.
    """

    run: tyro.conf.Positional[Path]
    picture: Path = Path("learning_curve.png")
    json: Path | None = None


def main(args: Args) -> None:
    run = RunConfig.from_toml(args.run / CONFIG_FILE)
    lines = [json.loads(line) for line in (args.run / JSON_LINES).read_text().splitlines()]
    validated = [line for line in lines if "validation_bits_per_byte" in line]
    tokens_per_step = run.training.batch_size * run.data.sequence_length
    bits = [line["validation_bits_per_byte"] for line in validated]

    corpus = standard_library(run.data.validation_fraction)
    held_out = [piece.text for piece, side in corpus.documents(corpus.files) if side == VALIDATION]
    compressors = {
        "gzip -9": bits_per_byte(held_out, lambda text: gzip.compress(text, 9)),
        "xz -9": bits_per_byte(held_out, lambda text: lzma.compress(text, preset=9)),
    }
    rows: list[Row] = [
        {"held-out text": name, "bits per byte": v} for name, v in compressors.items()
    ]
    rows.append({"held-out text": f"Hymba, {args.run}", "bits per byte": bits[-1]})
    report("each held-out file by itself; Hymba in windows of its sequence length", rows, args.json)

    plt.figure(figsize=(7, 3.5), layout="constrained")
    plt.plot(
        [line["step"] * tokens_per_step / 1e6 for line in validated], bits, "o-", label="Hymba"
    )
    for style, (name, value) in zip(("--", ":"), compressors.items(), strict=True):
        plt.axhline(value, color="gray", linestyle=style, label=name)
    plt.xlabel("training tokens, millions")
    plt.ylabel("bits per byte, held-out files")
    plt.legend()
    plt.savefig(args.picture, dpi=120)


def bits_per_byte(documents: list[str], compress: Callable[[bytes], bytes]) -> float:
    """Bits a byte of the documents, each compressed by itself."""
    encoded = [document.encode() for document in documents]
    return 8 * sum(len(compress(text)) for text in encoded) / sum(map(len, encoded))


if __name__ == "__main__":
    main(tyro.cli(Args))
