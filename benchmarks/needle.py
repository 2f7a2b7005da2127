"""Needles in a haystack, before and after training on needles, at lengths beyond training.

    python benchmarks/needle.py --picture benchmarks/needle.png

The model learns from parts of Python's standard library in which a line with a number stands
several times: after the first one, the number can be recalled. Then it is asked for numbers in
held-out files as `hymba evaluate --needle.lengths` does, and so is the model before. A run of as
many steps that is there is resumed. The picture takes the extra `plots`.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro
from _report import Row, report

from hymba_jax.checkpoint.load import load_model
from hymba_jax.config.data import DataConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data.corpus import standard_library
from hymba_jax.data.manifest import TRAIN, VALIDATION
from hymba_jax.evaluation.needle import NeedleConfig, NeedleReport, draw_heat_map, find_needles
from hymba_jax.files import replace_text
from hymba_jax.host import prepare_host
from hymba_jax.inference import LanguageModel
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.train import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH = 256  # of the sequences of training
LINES = 4  # with the number, of each document


@dataclass(frozen=True)
class Args:
    """Trains and asks.

    Attributes:
      model: a run, or a model.
      output: directory for documents and runs, by steps.
      steps: of training, of 8 sequences each.
      lengths: of the prompts, in tokens.
      trials: of each length and depth.
      picture: heat maps of both models; into `output` if absent.
      json: file for the rows as JSON lines.
    """

    model: str = "runs/tiny"
    output: Path = Path("runs/needle")
    steps: int = 400
    lengths: tuple[int, ...] = (64, 128, 256, 384, 512, 768, 1024)
    trials: int = 16
    picture: Path | None = None
    json: Path | None = None


def main(args: Args) -> None:
    prepare_host()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.load(args.model)
    config = NeedleConfig(lengths=args.lengths, depths=6, trials=args.trials)
    documents = args.output / f"documents_{args.steps}.jsonl"
    if not documents.exists():
        made = make_documents(tokenizer, config.phrase, args.steps * 8)
        replace_text(documents, "".join(json.dumps({"text": text}) + "\n" for text in made))
    run = str(args.output / f"run_{args.steps}")
    train(run_of(args, documents, run))
    reports: dict[str, NeedleReport] = {}
    rows: list[Row] = []
    for name, directory in (("before", args.model), ("after", run)):
        model = LanguageModel(load_model(directory), tokenizer, batch_size=16)
        reports[name] = find_needles(model, corpus_tokens(tokenizer, VALIDATION), config, 0, {})
        for i, length in enumerate(args.lengths):
            row: Row = {"model": name, "tokens": length}
            row |= {"accuracy": float(reports[name].accuracy[i].mean())}
            row |= {"nats per token": float(reports[name].nats[i].mean())}
            rows.append(row | {"without needle": float(reports[name].without[i])})
    report(f"needles, trained for {args.steps} steps on {LENGTH} tokens", rows, args.json)
    draw(reports, args.picture or args.output / "needle.png")


def corpus_tokens(tokenizer: Tokenizer, side: str) -> Iterator[list[int]]:
    """The tokens of the files of one side of the default corpus."""
    corpus = standard_library(DataConfig().validation_fraction)
    for document, its_side in corpus.documents(corpus.files):
        if its_side == side:
            yield tokenizer.encode(document.text)


def make_documents(tokenizer: Tokenizer, phrase: str, count: int) -> Iterator[str]:
    """Parts of files, of at most `LENGTH` tokens in all, with one number in several lines."""
    rng = random.Random(0)
    tokens = [token for document in corpus_tokens(tokenizer, TRAIN) for token in document]
    for _ in range(count):
        line = f"\n{phrase} {rng.randrange(10_000, 100_000)}.\n"
        most = LENGTH - 8 - LINES * len(tokenizer.encode(line))
        size = rng.randrange(most // 4, most)
        first = rng.randrange(len(tokens) - size)
        cuts = sorted(rng.randrange(size + 1) for _ in range(LINES))
        bounds = zip([0, *cuts], [*cuts, size], strict=True)
        yield line.join(
            tokenizer.decode(tokens[first + start : first + stop]) for start, stop in bounds
        )


def run_of(args: Args, documents: Path, output: str) -> RunConfig:
    """The run that trains the model further, on needles."""
    return RunConfig(
        output=output,
        init_from=args.model,
        model=load_model(args.model).config,
        data=DataConfig(
            path=str(documents),
            tokenizer=args.model,
            sequence_length=LENGTH,
            packing="documents",
            validation_packing="documents",
        ),
        training=TrainingConfig(
            steps=args.steps,
            batch_size=8,
            learning_rate=1e-3,
            schedule="cosine",
            log_every=20,
            validate_every=200,
            checkpoint_every=200,
            sample_tokens=0,
        ),
    )


def draw(reports: dict[str, NeedleReport], picture: Path) -> None:
    """The accuracy of each model as a heat map; a line ends the lengths of training."""
    figure, axes = plt.subplots(
        1, len(reports), figsize=(5.5 * len(reports), 3.6), layout="constrained", sharey=True
    )
    for axis, (name, found) in zip(axes, reports.items(), strict=True):
        image = draw_heat_map(axis, found, found.accuracy, 1.0)
        trained = sum(length <= LENGTH for length in found.lengths)
        axis.axvline(trained - 0.5, color="white", linestyle=":")
        axis.set_title(f"accuracy, {name}")
        axis.label_outer()
    figure.colorbar(image, ax=axes)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args))
