"""Needle in a haystack: a number at some depth of a long prompt, asked for at its end (Fig. 10).

The prompt is a part of the haystack; in it, at a depth, stands the needle, a line that names a
number. Its last line begins as the needle does, so that the model has to complete it with the
number. It need not follow instructions: what is measured is recall, of any language model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.table import Table

from hymba_jax.config.field_types import Bounds
from hymba_jax.errors import HymbaError
from hymba_jax.evaluation.replicas import Replicas
from hymba_jax.figures import make_figure, save_figure
from hymba_jax.inference import LanguageModel
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.types import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

WITHOUT_NEEDLE = "nats_per_token_without_needle"
"""What only files of this evaluation have."""
NEEDLE_BOUNDS = {
    "depths": Bounds(2, 1000, "more than a picture shows"),
    "trials": Bounds(1, 100_000, "more than an evaluation needs"),
}


@dataclass(frozen=True)
class NeedleConfig:
    """A needle in a haystack; the haystack is `data.path`, or the held-out files of Python's
    standard library.

    Attributes:
      lengths: tokens of the prompts that the number is predicted from.
      depths: places of the needle, from the beginning of the prompt to its end.
      trials: numbers and haystacks of each length and depth.
      phrase: the line of the needle, without the number.
    """

    lengths: tuple[int, ...] = ()
    depths: int = 5
    trials: int = 8
    phrase: str = "The magic number is"


class Trial(NamedTuple):
    """A prompt and the number that completes it.

    Attributes:
      cell: of a length and a depth; the last depth is none, the prompt is without the needle.
      tokens: all of them.
      answer: how many at the end are the number.
    """

    cell: tuple[int, int]
    tokens: list[int]
    answer: int


@dataclass(frozen=True, eq=False)
class NeedleReport:
    """What came out.

    Attributes:
      about: how it was measured.
      lengths: of the prompts, in tokens.
      depths: of the needle, as a share of the prompt before the question.
      accuracy: how often greedy decoding gives the number.
      nats: cross entropy of a token of the number.
      without: the same of prompts that have no needle.
    """

    about: dict[str, Any]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    accuracy: Float[np.ndarray, "lengths depths"]
    nats: Float[np.ndarray, "lengths depths"]
    without: Float[np.ndarray, " lengths"]

    def as_json(self) -> dict[str, Any]:
        return {
            **self.about,
            "lengths": [*self.lengths],
            "depths": [*self.depths],
            "accuracy": self.accuracy.tolist(),
            "nats_per_token": self.nats.tolist(),
            WITHOUT_NEEDLE: self.without.tolist(),
        }

    @classmethod
    def from_json(cls, results: Mapping[str, Any]) -> "NeedleReport":
        """What `as_json` wrote."""
        return cls(
            {},
            tuple(results["lengths"]),
            tuple(results["depths"]),
            np.array(results["accuracy"], float),
            np.array(results["nats_per_token"], float),
            np.array(results[WITHOUT_NEEDLE], float),
        )


def find_needles(
    model: LanguageModel,
    haystack: Iterable[Sequence[int]],
    config: NeedleConfig,
    seed: int,
    about: dict[str, Any],
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> NeedleReport:
    """Scores all prompts, on all devices.

    Args:
      haystack: tokens of documents, of which as many are taken as are needed.
      seed: of the numbers, and of where in the haystack a prompt begins.

    Raises:
      HymbaError: a length is too short for needle and question, or longer than the model's context
        or the haystack; or the model's logits are not finite.
    """
    trials = [*make_trials(model.tokenizer, haystack, config, seed, model.engine.max_context)]
    model.engine.check_memory(min(len(trials), model.batch_size), max(config.lengths))
    trials.sort(key=lambda trial: len(trial.tokens), reverse=True)
    batches = [*batched(trials, model.batch_size)]
    shape = len(config.lengths), config.depths + 1
    found, nats = np.zeros(shape), np.zeros(shape)
    results = Replicas(model).map(_score, batches)
    for done, (batch, scored) in enumerate(zip(batches, results, strict=True), 1):
        for trial, (cost, is_found) in zip(batch, scored, strict=True):
            if np.isnan(cost):
                raise HymbaError("the model's logits are not finite: its parameters may be damaged")
            nats[trial.cell] += cost / config.trials
            found[trial.cell] += is_found / config.trials
        advance(done, len(batches))
    depths = np.linspace(0, 1, config.depths)
    return NeedleReport(
        about, config.lengths, tuple(depths.tolist()), found[:, :-1], nats[:, :-1], nats[:, -1]
    )


def make_trials(
    tokenizer: Tokenizer,
    haystack: Iterable[Sequence[int]],
    config: NeedleConfig,
    seed: int,
    max_context: int,
) -> Iterable[Trial]:
    """The prompts of all lengths and depths; those of one trial and length have the same haystack.

    Prompts of one length do not depend on the other lengths.

    Raises:
      HymbaError: as `find_needles`.
    """
    longest = max(config.lengths)
    if longest > max_context:
        raise HymbaError(
            f"needle.lengths has {longest} tokens, the model's context is {max_context}: give "
            "shorter ones"
        )
    hay: list[int] = []
    for document in haystack:
        hay += document
        if len(hay) >= 4 * longest:
            break
    start, question = tokenizer.bos_ids, tokenizer.encode(f"\n{config.phrase}")
    for row, length in enumerate(config.lengths):
        pool = hay[: 4 * length]
        for trial in range(config.trials):
            rng = np.random.default_rng((seed, length, trial))
            # Lines are encoded whole: tokenizers may add a space to whatever they are given, and
            # have tokens that reach over the end of the phrase.
            line = f"\n{config.phrase} {rng.integers(10_000, 100_000)}"
            needle, ending = tokenizer.encode(f"{line}.\n"), tokenizer.encode(line)
            pairs = zip(question, ending, strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            # The number's last token is predicted from all tokens but itself.
            size = length + 1 - len(start) - len(ending)
            if size < len(needle):
                raise HymbaError(f"needle.lengths has {length}, too short for needle and question")
            if size > len(pool):
                raise HymbaError(
                    f"the haystack has {len(pool)} tokens, a text of {length} takes {size}: give a "
                    "longer one, or shorter lengths"
                )
            first = int(rng.integers(len(pool) - size + 1))
            text = pool[first : first + size]
            room = size - len(needle)
            for column, depth in enumerate(np.linspace(0, room, config.depths)):
                at = round(float(depth))
                tokens = [*start, *text[:at], *needle, *text[at:room], *ending]
                yield Trial((row, column), tokens, len(ending) - common)
            tokens = [*start, *text, *ending]
            yield Trial((row, config.depths), tokens, len(ending) - common)


def _score(model: LanguageModel, batch: Sequence[Trial]) -> list[tuple[float, bool]]:
    """The cross entropy of a token of each number, and whether greedy decoding gives it."""
    scores = model.engine.score([trial.tokens for trial in batch])
    return [
        (
            -float(score.log_probs[-trial.answer :].mean(dtype=np.float64)),
            bool(score.is_likeliest[-trial.answer :].all()),
        )
        for trial, score in zip(batch, scores, strict=True)
    ]


def needle_table(report: NeedleReport) -> Table:
    """Accuracy and cross entropy by depth and length."""
    table = Table(
        title="accuracy, and nats per token of the number",
        caption="tokens of the prompt from left to right, the needle's depth from top to bottom",
    )
    table.add_column("depth", justify="right")
    for length in report.lengths:
        table.add_column(f"{length:,}", justify="right")
    for i, depth in enumerate(report.depths):
        cells = zip(report.accuracy[:, i], report.nats[:, i], strict=True)
        table.add_row(f"{depth:.0%}", *(f"{found:.0%} {nats:.2f}" for found, nats in cells))
    table.add_section()
    table.add_row("no needle", *(f"{nats:.2f}" for nats in report.without))
    return table


def save_needles(report: NeedleReport, path: Path) -> None:
    """Writes the heat maps.

    Raises:
      HymbaError: as `make_figure`.
    """
    figure = make_figure(path, 11, 4)
    draw_needles(figure, report)
    save_figure(figure, path)


def draw_needles(figure: "Figure", report: NeedleReport) -> None:
    """Heat maps of accuracy and cross entropy, in an empty figure."""
    panels = (("accuracy", report.accuracy, 1.0), ("nats per token", report.nats, None))
    for axis, (name, values, most) in zip(figure.subplots(1, 2), panels, strict=True):
        figure.colorbar(draw_heat_map(axis, report, values, most))
        axis.set_title(name)


def draw_heat_map(
    axis: "Axes",
    report: NeedleReport,
    values: Float[np.ndarray, "lengths depths"],
    most: float | None,
) -> "AxesImage":
    """Values of a report by length and depth, in colors from 0 to `most`."""
    picture = axis.imshow(values.T, aspect="auto", vmin=0, vmax=most, cmap="viridis")
    axis.set_xticks(range(len(report.lengths)), [f"{length:,}" for length in report.lengths])
    axis.set_yticks(range(len(report.depths)), [f"{depth:.0%}" for depth in report.depths])
    axis.set_xlabel("tokens of the prompt")
    axis.set_ylabel("depth of the needle")
    return picture
