"""What extending the context does: bits per byte by position, before and after.

    python benchmarks/context_extension.py [--picture FILE]

Trains a run of several stages, or resumes it, and scores all held-out text in windows of the last
stage's length, each without earlier context: by the model at the end of the stage before, as it is
and with the last stage's RoPE base, and by the trained model.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from _report import Row, report
from flax import nnx

from hymba_jax.checkpoint.load import load_model
from hymba_jax.config.run import RunConfig
from hymba_jax.data import IGNORED_TARGET, Batch, open_data, validation_batches
from hymba_jax.host import prepare_host
from hymba_jax.model import Hymba
from hymba_jax.ops.cross_entropy import cross_entropy
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.train import train
from hymba_jax.types import Array, Float

ROWS = 8  # of a batch

type Spans = Float[np.ndarray, " spans"]
"""A number for each span of positions."""


@dataclass(frozen=True)
class Args:
    """Trains, scores and draws.

    Attributes:
      config: of a run whose last stage extends the context.
      output: the run directory; the config's if empty.
      span: positions of a point of the curves.
      picture: where they are drawn.
      json: file for the rows as JSON lines.
    """

    config: Path = Path("configs/context_extension.toml")
    output: str = ""
    span: int = 32
    picture: Path = Path("context_extension.png")
    json: Path | None = None


def main(args: Args) -> None:
    prepare_host()
    run = RunConfig.from_toml(args.config)
    run = dataclasses.replace(run, output=args.output or run.output)
    before, after = run.resolved_stages[-2:]
    train(run)
    trained, extended = (load_model(run.output, step=stage.stop) for stage in (before, after))
    short, long = before.run.data.sequence_length, after.run.data.sequence_length
    extended_graph, _ = nnx.split(extended)  # without parameters; the RoPE base is part of it
    models = {
        f"trained on {short} tokens": trained,
        f"the same with the base for {long}": nnx.merge(extended_graph, nnx.state(trained)),
        f"trained on {long} tokens, too": extended,
    }
    tokenizer = Tokenizer.load(run.output)
    rows = open_data(after.run.data, tokenizer, run.output).validation_sets(after.run.data)
    batches = [batch for each in rows.values() for batch in validation_batches(each.rows, ROWS)]
    num_bytes = bytes_of_spans(batches, tokenizer, args.span)
    curves = {name: nats_of_spans(model, batches, args.span) for name, model in models.items()}
    curves = {name: nats / math.log(2) / num_bytes for name, nats in curves.items()}
    report(
        f"bits per byte of held-out text, in windows of {long} tokens",
        [*spans(curves, num_bytes, args.span, short)],
        args.json,
    )
    draw(curves, args.span, short, args.picture)


def nats_of_spans(model: Hymba, batches: Sequence[Batch], span: int) -> Spans:
    """Cross entropy by span of positions, summed over all rows."""
    graph, params = nnx.split(model)

    @jax.jit
    def nats(params: nnx.State, batch: Batch) -> Float[Array, " positions"]:
        model = nnx.merge(graph, params)
        kernel, valid = model.output_projection, batch.targets != IGNORED_TARGET
        hidden, axes = model.last_hidden_state(batch.inputs), kernel.get_metadata("axes")
        return cross_entropy(hidden, kernel[...], batch.targets, valid, axes=axes).nats.sum(0)

    total = sum(np.asarray(nats(params, batch), np.float64) for batch in batches)
    return np.asarray(total).reshape(-1, span).sum(1)


def bytes_of_spans(batches: Sequence[Batch], tokenizer: Tokenizer, span: int) -> Spans:
    """UTF-8 bytes of the targets by span of positions, summed over all rows."""
    total = np.zeros(batches[0].targets.shape[1] // span)
    for row in np.concatenate([batch.targets for batch in batches]):
        for i, targets in enumerate(row.reshape(-1, span)):
            total[i] += len(tokenizer.decode(targets[targets != IGNORED_TARGET].tolist()).encode())
    return total


def spans(curves: dict[str, Spans], num_bytes: Spans, span: int, short: int) -> Iterator[Row]:
    """The curves up to the length trained on before and beyond it, and as a whole."""
    first = short // span
    for name, bits in curves.items():
        parts = {
            f"first {short}": slice(first),
            f"after {short}": slice(first, None),
            "all": slice(None),
        }
        yield {"model": name} | {
            part: float(np.average(bits[where], weights=num_bytes[where]))
            for part, where in parts.items()
        }


def draw(curves: dict[str, Spans], span: int, short: int, picture: Path) -> None:
    """Bits per byte over the position; beyond the axis where a model is far worse than others."""
    plt.figure(figsize=(7, 3.5), layout="constrained")
    for name, bits in curves.items():
        plt.plot(span * (np.arange(len(bits)) + 0.5), bits, "o-", markersize=3, label=name)
    plt.axvline(short, color="gray", linestyle=":")
    plt.xlabel("position in the context, tokens")
    plt.ylabel("bits per byte, held-out text")
    plt.legend()
    plt.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args))
