"""Speed of prefill and decode on this machine, and how close it is to the machine's limits.

python benchmarks/inference.py [--shape 125m 1.5b] [--batch 1 8] [--context 1024 8192]
    [--dtype float32] [--quick]

Random weights. Each row is measured in a process of its own, so that its peak of memory is its own;
times are medians, of programs that were compiled before.

prefill: `Engine.prefill` of `context` tokens a prompt.
    GFLOP/s counts useful FLOPs only, as `hymba_jax/model/flops.py` does; the vocabulary only
    after the last token.
    `of matmul rate` is its share of the best rate, in the same process, of matmuls of the model's
    own shapes: `train_step.py` says which.
first token: a whole `LanguageModel.generate` of one token, from a prompt of `context` - 1 tokens.
decode: `Engine.decode` of 16 tokens a sequence, greedily, with `context` - 64 of them in each
    cache. Only their number matters for time, so it is set, and the cache holds zeros.
    GB/s is what a token must read: every parameter once (of the embedding, all rows, which are the
    output's kernel), and the cache's filled slots for each layer that reads them, and the states
    read and written.
    `of read bandwidth` is its share of the best rate, in the same process, of two ways to read all
    parameters once: the sum of each array, and a vector times each kernel.

A second table has the time of a decoded token at the longest context over that at the shortest.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _report import Row, median_ms, peak_bytes, report, run_in_subprocess, short_ms, write_json
from flax import nnx
from rich.console import Console
from train_step import best_matmul_rate

from hymba_jax.config import PRESETS, ComputeConfig, DType, HymbaConfig
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.host import prepare_host
from hymba_jax.inference.batch_state import Request, SampledTokens
from hymba_jax.inference.engine import Engine
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.inference.programs import DECODE_STEPS
from hymba_jax.model import Hymba
from hymba_jax.model.flops import forward_flops
from hymba_jax.tokenizer import build_tokenizer

Shape = Literal["125m", "1.5b"]
ROOM = 64  # tokens that decoding may add
LONG = 8192


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      dtype: of parameters, activations and caches.
      repeats: timed calls of each kind; one where more than `LONG` tokens are prefilled.
      longest: tokens times width above which prefill is skipped.
      quick: one timed call of each kind, and contexts an eighth as long.
      row: measure one combination in this process and write it to `json`; what each child does.
    """

    shape: tuple[Shape, ...] = ("125m", "1.5b")
    batch: tuple[int, ...] = (1, 8)
    context: tuple[int, ...] = (1024, 8192)
    dtype: DType = "float32"
    repeats: int = 3
    longest: int = 8192 * 8 * 1024
    quick: bool = False
    row: bool = False
    json: Path | None = None


def main(options: Options) -> None:
    if options.row:
        measure_row(options)
        return
    if options.quick:
        contexts = tuple(max(context // 8, 2 * ROOM) for context in options.context)
        options = dataclasses.replace(options, repeats=1, context=contexts, quick=False)
    combinations = list(product(options.shape, options.batch, options.context))
    progress = Console(stderr=True)
    rows: list[Row] = []
    for i, (shape, batch, context) in enumerate(combinations):
        progress.print(f"{i + 1} of {len(combinations)}: {shape}, {batch} x {context}")
        start = time.perf_counter()
        child_options = dataclasses.replace(
            options, shape=(shape,), batch=(batch,), context=(context,)
        )
        rows.append(_in_child(child_options))
        progress.print(f"  {time.perf_counter() - start:.0f} s")
    names = ("shape", "batch", "context")
    for title in ("prefill", "decode"):
        table = [
            {name: row[name] for name in names}
            | {
                name.removeprefix(f"{title} "): value
                for name, value in row.items()
                if name.startswith(title)
            }
            for row in rows
        ]
        report(f"{title}, {options.dtype}, random weights", table)
    short, long = min(options.context), max(options.context)
    if short < long:
        report(f"a decoded token, {long} tokens of context over {short}", ratios(rows, short, long))
    if options.json is not None:
        write_json(rows, options.json)


def ratios(rows: Sequence[Row], short: int, long: int) -> list[Row]:
    """How much longer a decoded token takes with more context."""
    times = {
        (row["shape"], row["batch"], row["context"]): float(row["decode ms per token"])
        for row in rows
    }
    return [
        {
            "shape": shape,
            "batch": batch,
            f"ms at {short}": times[shape, batch, short],
            f"ms at {long}": times[shape, batch, long],
            "ratio": times[shape, batch, long] / times[shape, batch, short],
        }
        for shape, batch in dict.fromkeys((row["shape"], row["batch"]) for row in rows)
    ]


def _in_child(options: Options) -> Row:
    """The row that a process of its own measures."""
    arguments = [
        *("--shape", options.shape[0], "--batch", str(options.batch[0])),
        *("--context", str(options.context[0]), "--repeats", str(options.repeats)),
        *("--longest", str(options.longest), "--dtype", options.dtype),
    ]
    return run_in_subprocess(__file__, arguments)


def measure_row(options: Options) -> None:
    """Measures one combination and writes it as JSON."""
    prepare_host()
    shape, batch, context = options.shape[0], options.batch[0], options.context[0]
    config = PRESETS[f"hymba-{shape}"]
    tokenizer = build_tokenizer("bytes", [])
    model = LanguageModel(random_model(config, options.dtype), tokenizer, batch_size=batch)
    engine = model.engine
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 250, context).tolist() for _ in range(batch)]
    shorter = [prompt[:-1] for prompt in prompts]
    flops = batch * forward_flops(config, context, predicted=1)
    repeats = 1 if batch * context > LONG else options.repeats

    token_ms = decode_ms(engine, batch, context, repeats)
    prefill_ms = first_ms = math.nan
    if batch * context * config.hidden_size <= options.longest:
        # Two chunks compile all that longer prompts need, with the same cache.
        warm = [prompt[: 2 * engine.max_chunk] for prompt in prompts]
        jax.block_until_ready(engine.prefill(warm, context))
        prefill_ms = median_ms(lambda: engine.prefill(prompts, context), warmup=0, repeats=repeats)
        first_ms = median_ms(
            lambda: model.generate(shorter, max_new_tokens=1), warmup=0, repeats=repeats
        )
    peak = peak_bytes()
    matmul_rate, read_rate = best_matmul_rate(config, options.dtype), best_read_rate(engine)
    needed = decode_bytes(engine, batch, context)
    row: Row = {
        "shape": shape,
        "batch": batch,
        "context": context,
        "prefill s": prefill_ms / 1e3,
        "prefill tokens/s": 1e3 * batch * context / prefill_ms,
        "prefill GFLOP/s": flops / prefill_ms / 1e6,
        "prefill matmul GFLOP/s": matmul_rate / 1e9,
        "prefill of matmul rate": 1e3 * flops / prefill_ms / matmul_rate,
        "prefill first token s": first_ms / 1e3,
        "prefill peak GB": peak / 1e9,
        "decode ms per token": token_ms,
        "decode tokens/s": 1e3 * batch / token_ms,
        "decode GB": needed / 1e9,
        "decode GB/s": needed / token_ms / 1e6,
        "read bandwidth GB/s": read_rate / 1e9,
        "decode of read bandwidth": 1e3 * needed / token_ms / read_rate,
    }
    if options.json is not None:
        write_json([row], options.json)


def random_model(config: HymbaConfig, dtype: DType) -> Hymba:
    """A model with random kernels, sampled one array at a time."""
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype, scan_layers=False)
    graph, abstract = nnx.split(Hymba.abstract(config, compute))
    rng = np.random.default_rng(0)

    def fill(array: jax.ShapeDtypeStruct) -> jax.Array:
        if len(array.shape) < 2:
            return jnp.ones(array.shape, array.dtype)
        values = rng.random(array.shape, np.float32)
        values -= 0.5
        values *= 0.07  # a standard deviation of 0.02
        return jnp.asarray(values, array.dtype)

    return nnx.merge(graph, jax.tree.map(fill, abstract))


def decode_ms(engine: Engine, batch: int, context: int, repeats: int) -> float:
    """Milliseconds of a step that samples a token for each sequence, with an almost full cache."""
    empty = engine.init_prefill(batch, context)
    lengths = jnp.full(batch, context - ROOM, jnp.int32)
    prefilled = empty._replace(cache=empty.cache._replace(lengths=lengths))
    requests = [Request((), SamplingConfig(), i, context) for i in range(batch)]
    state, _ = engine.insert(prefilled, requests)

    def step() -> SampledTokens:
        nonlocal state
        state, sampled = engine.decode(state)
        return sampled

    return median_ms(step, warmup=1, repeats=repeats) / DECODE_STEPS


def decode_bytes(engine: Engine, batch: int, context: int) -> int:
    """Bytes that sampling a token for each sequence must read, and of the states write."""
    cache = jax.eval_shape(lambda: engine.init_prefill(batch, context)).cache
    filled = context - ROOM
    total, kv = _bytes(engine.params), 0
    for layer in cache.layers:
        if layer.kv is not None:
            slots = layer.kv.key.shape[2]
            kv = _bytes(layer.kv) * min(filled, slots) // slots
        total += kv + 2 * _bytes(layer.ssm)
    return total


def best_read_rate(engine: Engine) -> float:
    """Bytes of parameters per second, read in the faster of two ways."""

    def sums(params: Any) -> list[jax.Array]:
        return [leaf.sum() for leaf in jax.tree.leaves(params)]

    def products(params: Any) -> list[jax.Array]:
        leaves = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
        return [jnp.ones((1, leaf.shape[0])) @ leaf for leaf in leaves]

    def rate(function: Callable[[Any], Any]) -> float:
        call = jax.jit(function)
        return 1e3 * _bytes(engine.params) / short_ms(lambda: call(engine.params), repeats=5)

    return max(rate(sums), rate(products))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main(tyro.cli(Options))
