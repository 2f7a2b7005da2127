"""Parameters, memory, and the speed on this machine."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from hymba_jax.analysis.figures import draw_cache
from hymba_jax.analysis.memory import param_bytes, training_bytes
from hymba_jax.config import HymbaConfig
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.convert.inspect import count_by_part
from hymba_jax.display import format_bytes
from hymba_jax.errors import HymbaError
from hymba_jax.inference import LanguageModel
from hymba_jax.inference.batch_state import Request
from hymba_jax.inference.engine import Engine
from hymba_jax.inference.memory import meta_state_bytes
from hymba_jax.inference.programs import DECODE_STEPS
from hymba_jax.report.page import Picture, Section, Table
from hymba_jax.report.svg import new_figure

_NEW = 4 * DECODE_STEPS  # tokens that are decoded


class Speed(NamedTuple):
    """Tokens per second of a batch of so many sequences."""

    batch: int
    prompt: int
    prefill: float
    decode: float


def measure_speed(
    model: LanguageModel,
    tokens: Sequence[int],
    *,
    batches: Sequence[int] = (1, 8),
    prompt: int = 256,
) -> list[Speed]:
    """The speed of prefill and of greedy decoding behind it, each timed once when compiled.

    Args:
      tokens: prompts are the first of them.
      batches: sequences at a time; half as many, and so on, where they do not fit into memory.
      prompt: tokens of each prompt, fewer where the model's context is short.

    Raises:
      HymbaError: one sequence does not fit.
    """
    prompt = min(prompt, model.engine.max_context - _NEW - 1)
    if prompt < 1:
        return []
    fitting = {_that_fit(model.engine, batch, prompt + _NEW + 1) for batch in batches}
    return [_measure(model, tokens[:prompt], batch) for batch in sorted(fitting)]


def _that_fit(engine: Engine, batch: int, context: int) -> int:
    """As many sequences as fit into memory, of `batch`, half of it, and so on.

    Raises:
      HymbaError: one does not fit.
    """
    try:
        engine.check_memory(batch, context)
    except HymbaError:
        if batch == 1:
            raise
        return _that_fit(engine, batch // 2, context)
    return batch


def _measure(model: LanguageModel, prompt: Sequence[int], batch: int) -> Speed:
    engine, context = model.engine, len(prompt) + _NEW + 1
    requests = [Request(prompt, SamplingConfig(), 0, _NEW + 1)] * batch
    for _ in range(2):  # the first time compiles
        start = time.perf_counter()
        prefilled = jax.block_until_ready(engine.prefill([prompt] * batch, context))
        prefill = time.perf_counter() - start
        state = jax.block_until_ready(engine.insert(prefilled, requests)[0])
        start = time.perf_counter()
        for _ in range(_NEW // DECODE_STEPS):
            state, _ = engine.decode(state)
        jax.block_until_ready(state)
        decode = time.perf_counter() - start
    return Speed(batch, len(prompt), batch * len(prompt) / prefill, batch * _NEW / decode)


def costs_section(
    model: LanguageModel, speeds: Sequence[Speed], training: TrainingConfig
) -> Section:
    """Tables, and the cache over the context."""
    config, dtype = model.config, model.engine.dtype
    figure = new_figure(9, 3.2)
    draw_cache(figure.subplots(), config, dtype)
    caption = (
        "What one sequence keeps between tokens. Global layers keep keys and values of all "
        "tokens, window layers of the last ones, SSM heads a state of fixed size; layers that "
        "share keys and values keep none. The paper's Tab. 1 compares designs by this size."
    )
    speed = Table(
        "Speed here",
        ("sequences", "tokens of each prompt", "prefill, tokens/s", "decode, tokens/s"),
        [(f"{s.batch}", f"{s.prompt}", f"{s.prefill:,.0f}", f"{s.decode:,.0f}") for s in speeds],
        f"{model.engine.device_description}, {dtype}, greedily, compiled before; timed once",
    )
    return Section(
        "Memory and speed",
        pictures=[Picture("The cache over the context", caption, figure)],
        tables=[_memory(model, training), *([speed] if speeds else []), _parameters(config)],
    )


def _memory(model: LanguageModel, training: TrainingConfig) -> Table:
    config, dtype, context = model.config, model.engine.dtype, model.engine.max_context
    state = training_bytes(config, "float32", training=training)
    sizes = {
        f"parameters, {dtype}": param_bytes(config, dtype),
        f"cache of a sequence of {context:,} tokens": model.engine.row_bytes(context),
        "state after the meta tokens, once": sum(meta_state_bytes(config, dtype).values()),
        f"training in float32 by {training.optimizer}, without activations": state.total,
    }
    rows = [(name, format_bytes(size)) for name, size in sizes.items()]
    return Table("Memory", ("", "size"), rows)


def _parameters(config: HymbaConfig) -> Table:
    counts = count_by_part(config)
    rows = [(part, f"{count:,}", f"{count / counts.total():.1%}") for part, count in counts.items()]
    rows.append(("in all", f"{counts.total():,}", "100.0%"))
    return Table("Parameters", ("part", "number", "share"), rows)
