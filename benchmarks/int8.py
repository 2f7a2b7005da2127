"""Weights, and keys and values, in 8 bits (`--weights int8 --kv-cache int8`), on the CPU.

python benchmarks/int8.py [--shape 125m] [--model runs/tiny --text FILE ...] [--json FILE]

A decoding step of one sequence, with a context of 512, of a preset with random weights, and of a
trained model; times are the shortest of six loops of 16 steps. Bits per byte of a trained model are
those of the beginnings of text files, by default modules of hymba_jax.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from _report import Row, report
from inference import random_model

from hymba_jax import inference, load
from hymba_jax.config import PRESETS, CacheFormat, WeightFormat
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.host import prepare_host
from hymba_jax.inference.batch_state import Request
from hymba_jax.inference.engine import Engine
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.inference.programs import DECODE_STEPS

CONTEXT = 512
FORMATS: tuple[tuple[WeightFormat, CacheFormat], ...] = (  # of weights; of keys and values
    ("float", "float"),
    ("int8", "float"),
    ("float", "int8"),
    ("int8", "int8"),
)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      shape: of a preset; none if empty.
      model: directory of a trained model; none if empty.
      characters: of each text.
    """

    shape: str = "125m"
    model: str = ""
    text: tuple[Path, ...] = tuple(sorted(Path(inference.__file__).parent.glob("*.py")))
    characters: int = 600
    json: Path | None = None


def main(options: Options) -> None:
    prepare_host()
    rows = [*measured(options)]
    report("weights, keys and values in 8 bits", rows, options.json)


def measured(options: Options) -> Iterator[Row]:
    """A row for each model and format."""
    for weights, kv_cache in FORMATS:
        formats: Row = {"weights": weights, "KV cache": kv_cache}
        if options.shape:
            model = random_model(PRESETS[f"hymba-{options.shape}"], "float32")
            engine = Engine(model, weights=weights, kv_cache=kv_cache, context=CONTEXT)
            yield {
                "model": options.shape,
                **formats,
                "step, ms": step_ms(engine),
                "bits per byte": "",
            }
        if options.model:
            trained = load(options.model, weights=weights, kv_cache=kv_cache, context=CONTEXT)
            step, bits = step_ms(trained.engine), bits_per_byte(trained, options)
            yield {
                "model": options.model,
                **formats,
                "step, ms": step,
                "bits per byte": f"{bits:.4f}",
            }


def step_ms(engine: Engine) -> float:
    """Milliseconds of a decoding step of one sequence."""
    request = Request((), SamplingConfig(), 0, CONTEXT - 64)
    state, _ = engine.insert(engine.prefill([[1] * 32], CONTEXT), [request])
    times = []
    for _ in range(7):
        start = time.perf_counter()
        state, sampled = engine.decode(state)
        jax.block_until_ready(sampled)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:]) / DECODE_STEPS


def bits_per_byte(model: LanguageModel, options: Options) -> float:
    """Of the beginnings of the texts, each alone."""
    texts = [path.read_text()[: options.characters] for path in options.text]
    nats = sum(float(scores.sum()) for scores in model.log_probs(texts))
    return -nats / math.log(2) / sum(len(text.encode()) for text in texts)


if __name__ == "__main__":
    main(tyro.cli(Options))
