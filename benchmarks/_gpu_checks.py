"""The steps of `on_gpu.py` that ask whether results are right, at the sizes of the family.

Kernels are compared with the ops' definitions (their `reference` implementations), whole models
with what the HF implementation computed (tests/golden). No test's packages are needed.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _gpu_step import Recorder
from attention import attend
from flax import nnx
from jax.extend.backend import get_backend

from hymba_jax.config import (
    PRESETS,
    AttentionConfig,
    CacheFormat,
    ComputeConfig,
    HymbaConfig,
)
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.data import IGNORED_TARGET, Batch
from hymba_jax.inference.batch_state import NO_TOKEN, Request
from hymba_jax.inference.engine import Engine
from hymba_jax.model import Hymba, fuse_projections
from hymba_jax.model.quantized import quantize_kernels
from hymba_jax.ops.attention import attention_step
from hymba_jax.ops.attention.api import fastest
from hymba_jax.ops.causal_conv import causal_conv
from hymba_jax.ops.int8_rows import Int8Rows
from hymba_jax.ops.layer_step.projections import MAX_ROWS
from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.rms_norm import mean_of_norms, rms_norm_of_residual
from hymba_jax.ops.selective_scan import selective_scan
from hymba_jax.ops.selective_scan.api import FASTEST
from hymba_jax.ops.ssd import ssd
from hymba_jax.ops.ssd.api import fastest as fastest_ssd
from hymba_jax.training.loss import next_token_loss

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from golden_cases import GOLDEN, Golden, load, to_hf

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "mlp_size": 96,
    "attention": AttentionConfig(num_heads=2, num_kv_heads=1, window=16),
    "num_meta_tokens": 4,
}
EPS = 1e-6  # of norms
SLOTS = 1024  # of caches of decoding layers
QUICK = "tiny-default-rope"  # the golden model that compiles in the least time

# Of the largest entry: float32 rounds at 6e-8, and sums have thousands of terms. A result in
# bfloat16 is rounded once more, by up to 2**-9 of itself.
FLOAT32, BFLOAT16 = 1e-5, 2**-8
# Of the largest entry: attention rounds weights, values and results to bfloat16.
ATTENTION = {"float32": 1e-5, "bfloat16": 1e-2}
# Of the largest entry: kernels of SSD round weights, states and results to bfloat16.
SSD = 1e-2
# Those of tests/golden/README.md: absolute, and of each gradient's largest entry.
VALUES, GRADIENTS = 5e-4, 3e-4


class Sizes(NamedTuple):
    """Sizes of a scan."""

    batch: int
    length: int
    channels: int
    state: int = 16


class Heads(NamedTuple):
    """Sizes of an attention call."""

    query: int
    key: int
    length: int
    window: int | None
    meta: int
    head_dim: int = 64
    value_dim: int = 128
    documents: int = 1
    """In a row."""


def machine(recorder: Recorder) -> None:
    """What the other steps run on.

    Raises:
      SystemExit: no GPU is there, and this is no dry run.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" and not recorder.dry_run:
        raise SystemExit(f"JAX found no GPU, only {device.device_kind}")
    with recorder.case("device") as row:
        row |= {
            "kind": device.device_kind,
            "count": jax.device_count(),
            "jax": jax.__version__,
            "platform": get_backend().platform_version,
            "memory GB": (device.memory_stats() or {}).get("bytes_limit", 0) / 1e9,
        }


def conforming_scan(recorder: Recorder) -> None:
    """The scan's kernel, forward and backward, against its definition in float64."""
    some = Sizes(2, 70, 6, 4) if recorder.dry_run else Sizes(2, 1000, 1024)
    marked = Sizes(3, 70, 6, 4) if recorder.dry_run else Sizes(3, 300, 3200)
    cases = (("float32", some, False), ("bfloat16", some, False), ("float32", marked, True))
    for wanted in ("forward", "backward"):
        for dtype, sizes, has_marks in cases[recorder.dry_run :]:
            marks = ", documents and lengths" if has_marks else ""
            with recorder.case(f"{wanted}, {dtype}, {_by(sizes)}{marks}") as row:
                row["implementation"] = FASTEST.get(target_platform(), "xla")
                inputs, cotangents = _scan_inputs(sizes, dtype)
                given = _scan_marks(sizes) if has_marks else {}
                actual = _run_scan(selective_scan, wanted, None, inputs, cotangents, given)
                with jax.enable_x64(True):
                    inputs, cotangents = jax.tree.map(
                        lambda a: jnp.asarray(a, jnp.float64), (inputs, cotangents)
                    )
                    expected = _run_scan(
                        selective_scan, wanted, "reference", inputs, cotangents, given
                    )
                    expected = jax.tree.map(np.asarray, expected)
                bounds = {
                    name: _scan_bound(actual[name], exact) for name, exact in expected.items()
                }
                _compare(row, actual, expected, bounds)


def _scan_inputs(sizes: Sizes, dtype: str) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Every input, and cotangents of both results, that float32 or bfloat16 hold exactly."""
    batch, length, channels, state = sizes
    rng = np.random.default_rng(length)

    def normal(*shape: int, dtype: str = "float32") -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)

    row = partial(normal, batch, length, dtype=dtype)
    inputs = {
        "x": row(channels),
        "dt": row(channels) - 1,
        "A": -jnp.exp(normal(state, channels)),
        "B": row(state),
        "C": row(state),
        "D": normal(channels),
        "z": row(channels),
        "dt_bias": normal(channels),
        "initial_state": normal(batch, state, channels),
    }
    return inputs, (row(channels), normal(batch, state, channels))


def _scan_marks(sizes: Sequence[int]) -> dict[str, Any]:
    """Rows of several documents, two of them of one position, and rows that end early."""
    batch, length = sizes[:2]
    starts = np.isin(np.arange(length), [length // 2, length // 2 + 1, length - 1])
    ids = np.zeros((batch, length), np.int32)
    ids[[0, -1]] = starts.cumsum()
    return {
        "segment_ids": ids,
        "lengths": np.arange(1, batch + 1, dtype=np.int32) * length // batch,
    }


def _run_scan(
    op: Callable[..., Any],
    wanted: str,
    implementation: str | None,
    inputs: dict[str, Any],
    cotangents: tuple[Any, ...],
    marks: Mapping[str, Any],
) -> dict[str, Any]:
    """Both results of a recurrence, or the gradient of every input, by name."""
    scan = partial(op, **marks, implementation=implementation)

    def forward(inputs: dict[str, Any]) -> dict[str, jax.Array]:
        return dict(zip(("y", "state"), scan(**inputs), strict=True))

    def backward(inputs: dict[str, Any]) -> dict[str, jax.Array]:
        (gradients,) = jax.vjp(lambda inputs: scan(**inputs), inputs)[1](cotangents)
        return gradients

    return jax.jit(forward if wanted == "forward" else backward)(inputs)


def _scan_bound(actual: jax.Array, expected: np.ndarray) -> np.ndarray:
    relative = BFLOAT16 if actual.dtype == jnp.bfloat16 else 0
    return FLOAT32 * np.abs(expected).max() + relative * np.abs(expected)


def conforming_ssd(recorder: Recorder) -> None:
    """SSD in bfloat16, forward and backward, against its definition in float64."""
    sizes = (2, 70, 4, 2, 3, 5) if recorder.dry_run else (2, 500, 16, 1, 64, 128)
    inputs, cotangents = _ssd_inputs(*sizes)
    for wanted in ("forward", "backward"):
        for has_marks in (False, True):
            marks = ", documents and lengths" if has_marks else ""
            with recorder.case(f"{wanted}, bfloat16, {_by(sizes)}{marks}") as row:
                row["implementation"] = fastest_ssd(*(inputs[name] for name in ("x", "B", "C")))
                given = _scan_marks(sizes) if has_marks else {}
                actual = _run_scan(ssd, wanted, None, inputs, cotangents, given)
                with jax.enable_x64(True):
                    inputs64, cotangents64 = jax.tree.map(
                        lambda a: jnp.asarray(a, jnp.float64), (inputs, cotangents)
                    )
                    expected = _run_scan(ssd, wanted, "reference", inputs64, cotangents64, given)
                    expected = jax.tree.map(np.asarray, expected)
                _compare(row, actual, expected, _of_largest(SSD, expected))


def _ssd_inputs(
    batch: int, length: int, heads: int, groups: int, head_dim: int, state: int
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Every input, and cotangents of both results."""
    rng = np.random.default_rng(length)

    def normal(*shape: int, dtype: str = "float32") -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)

    row = partial(normal, batch, length, dtype="bfloat16")
    inputs = {
        "x": row(heads, head_dim),
        "dt": row(heads) - 2,
        "A": -jnp.exp(normal(heads)),
        "B": row(groups, state),
        "C": row(groups, state),
        "D": normal(heads),
        "dt_bias": normal(heads),
        "initial_state": normal(batch, heads, head_dim, state),
    }
    return inputs, (row(heads, head_dim), normal(batch, heads, head_dim, state))


def conforming_attention(recorder: Recorder) -> None:
    """The platform's attention, forward and backward, against its definition in float32."""
    wide = (5, 1) if recorder.dry_run else (25, 5)
    narrow = (2, 1) if recorder.dry_run else (8, 4)
    sizes = (40, 8, 4, 8, 16) if recorder.dry_run else (2176, 1024, 128)
    cases = (
        ("bfloat16", Heads(*narrow, 1000, None, 128)),
        ("bfloat16", Heads(*narrow, *sizes)),
        ("bfloat16", Heads(*wide, *sizes)),
        ("bfloat16", Heads(*wide, *sizes)._replace(documents=5)),
        ("bfloat16", Heads(*narrow, *sizes)._replace(window=None, documents=3)),
        ("float32", Heads(*narrow, *sizes)),
    )
    for wanted in ("forward", "backward"):
        for dtype, heads in cases[2 * recorder.dry_run :]:
            with recorder.case(f"{wanted}, {dtype}, {heads.query} heads, {_mask(heads)}") as row:
                rng = np.random.default_rng(heads.length)
                shapes = [
                    *((heads.query, heads.head_dim), (heads.key, heads.head_dim)),
                    *((heads.key, heads.value_dim), (heads.query, heads.value_dim)),
                ]
                of_rows = [(2, heads.length, *s) for s in shapes]
                of_meta = [(heads.meta, *s) for s in shapes[1:3]]
                *inputs, cotangent = (
                    jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)
                    for shape in (*of_rows[:3], *of_meta, of_rows[3])
                )
                query, key, value, *_ = inputs
                row["implementation"] = fastest(query, key, value, None, 0, heads.window)
                actual = _run_attention(wanted, None, heads, inputs, cotangent)
                *inputs, cotangent = (v.astype(jnp.float32) for v in (*inputs, cotangent))
                expected = _run_attention(wanted, "reference", heads, inputs, cotangent)
                expected = jax.tree.map(np.asarray, expected)
                _compare(row, actual, expected, _of_largest(ATTENTION[dtype], expected))


def _mask(heads: Heads) -> str:
    return (
        f"{heads.length} positions, window {heads.window}, {heads.meta} meta tokens, "
        f"{heads.documents} documents a row"
    )


def _run_attention(
    wanted: str, implementation: str | None, heads: Heads, inputs: list[Any], cotangent: Any
) -> dict[str, Any]:
    """The output, or the gradient of every input, by name."""
    ids = None
    if heads.documents > 1:
        ids = jnp.arange(heads.length) * heads.documents // heads.length
        ids = jnp.stack([ids, ids[::-1]])  # so that boundaries differ between rows
    run = partial(attend, window=heads.window, segment_ids=ids, implementation=implementation)

    def backward(*inputs: Any) -> dict[str, jax.Array]:
        gradients = jax.vjp(run, *inputs)[1](cotangent)
        names = ("query", "key", "value", "meta_key", "meta_value")
        return dict(zip(names, gradients, strict=True))

    def forward(*inputs: Any) -> dict[str, jax.Array]:
        return {"output": run(*inputs)}

    return jax.jit(forward if wanted == "forward" else backward)(*inputs)


def conforming_elementwise(recorder: Recorder) -> None:
    """Norms and the convolution by the platform's kernels, values and gradients, against their
    formulas in float64. Documents are shorter than the convolution, too."""
    batch, length, channels = (2, 20, 8) if recorder.dry_run else (3, 1000, 3200)
    segment_ids = np.cumsum(np.isin(np.arange(length), [1, 3, length // 2]))[None].repeat(batch, 0)
    cases: dict[str, tuple[Any, Any, list[tuple[int, ...]]]] = {
        "norm of a residual stream": (
            partial(rms_norm_of_residual, eps=EPS),
            lambda x, scale: (x, _norm(x, scale)),
            [(batch, length, channels), (channels,)],
        ),
        "mean of norms": (
            partial(mean_of_norms, eps=EPS),
            lambda x, other, *scales: (_norm(x, scales[0]) + _norm(other, scales[1])) / 2,
            [(batch, length, channels)] * 2 + [(channels,)] * 2,
        ),
        "convolution": (
            partial(_convolution, segment_ids=segment_ids),
            partial(_convolution_by_formula, segment_ids=segment_ids),
            [(batch, length, channels), (4, channels), (channels,), (batch, 3, channels)],
        ),
    }
    for name, (op, formula, shapes) in cases.items():
        for dtype, bound in (("float32", FLOAT32), ("bfloat16", 4 * BFLOAT16)):  # XLA rounds often
            with recorder.case(f"{name}, {dtype}, {_by((batch, length, channels))}") as row:
                rng = np.random.default_rng(0)
                arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
                actual = _values_and_gradients(op, arrays)
                with jax.enable_x64(True):
                    exact = [jnp.asarray(array, jnp.float64) for array in arrays]
                    expected = _values_and_gradients(formula, exact)
                    expected = jax.tree.map(np.asarray, expected)
                _compare(row, actual, expected, _of_largest(bound, expected))


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPS) * scale


def _convolution(
    x: Any, weight: Any, bias: Any, initial_inputs: Any, segment_ids: np.ndarray
) -> jax.Array:
    ids = jnp.asarray(segment_ids)
    return causal_conv(x, weight, bias, initial_inputs=initial_inputs, segment_ids=ids)[0]


def _convolution_by_formula(
    x: Any, weight: Any, bias: Any, initial_inputs: Any, segment_ids: np.ndarray
) -> jax.Array:
    """Of rows with the same documents, one document after the other."""
    outputs = []
    for document in np.unique(segment_ids[0]):
        own = x[:, segment_ids[0] == document]
        padded = jnp.concatenate([initial_inputs, own], axis=1)
        taps = range(len(weight))
        total = bias + sum(weight[k] * padded[:, k : k + own.shape[1]] for k in taps)
        outputs.append(jax.nn.silu(total))
    return jnp.concatenate(outputs, axis=1)


def _values_and_gradients(function: Any, arrays: list[jax.Array]) -> dict[str, jax.Array]:
    """By number; cotangents are cosines of positions."""

    def cotangent(value: jax.Array) -> jax.Array:
        return jnp.cos(jnp.arange(value.size)).reshape(value.shape).astype(value.dtype)

    @jax.jit
    def run(*arrays: jax.Array) -> list[jax.Array]:
        values, vjp = jax.vjp(function, *arrays)
        return [*jax.tree.leaves(values), *vjp(jax.tree.map(cotangent, values))]

    return {str(i): array for i, array in enumerate(run(*arrays))}


def conforming_decoding(recorder: Recorder) -> None:
    """Attention of one token by the platform's kernel, in bfloat16, against XLA in float32."""
    kv_heads, heads, widths, meta = 5, 25, (64, 128), 128
    for batch, slots in [(2, 40)] if recorder.dry_run else [(1, 8192), (8, 1000)]:
        for kind in ("bfloat16", "int8"):
            with recorder.case(f"cache in {kind}, {batch} x {slots} slots") as row:
                rng = np.random.default_rng(slots)

                def normal(*shape: int, rng: np.random.Generator = rng) -> jax.Array:
                    return jnp.asarray(rng.normal(size=shape).astype(np.float32), jnp.bfloat16)

                past: list[Any] = [normal(batch, kv_heads, slots, width) for width in widths]
                past = [*map(Int8Rows.of, past)] if kind == "int8" else past
                row["implementation"] = (
                    "kernel" if target_platform().endswith("gpu") else "plain XLA"
                )
                given = {"query": normal(batch, heads, widths[0])}
                for name, array, width in zip(("key", "value"), past, widths, strict=True):
                    given[name] = normal(batch, kv_heads, width)
                    given[f"past_{name}"] = array
                    given[f"meta_{name}"] = normal(kv_heads, meta, width)
                length = jnp.asarray([slots, 0, slots // 2, *[slots - 1] * batch][:batch])
                step = partial(jax.jit(attention_step), past_length=length)
                exact = {name: array.astype(jnp.float32) for name, array in given.items()}
                expected = {"output": np.asarray(step(**exact))}
                _compare(
                    row,
                    {"output": step(**given)},
                    expected,
                    _of_largest(ATTENTION["bfloat16"], expected),
                )


def decoding_layers(recorder: Recorder) -> None:
    """Layers in bfloat16 for few rows, by the kernels of `ops/layer_step`, beside the same layers
    for more rows, which XLA makes: as far from float32 as those are. The cache has so many slots
    that programs share those of a head."""
    config = dataclasses.replace(
        PRESETS["hymba-1.5b"], layers="G Ww", vocab_size=256, **(SMALL if recorder.dry_run else {})
    )
    tokens = np.random.default_rng(0).integers(3, 256, (MAX_ROWS + 1, 40))
    for kind in ("float", "int8"):
        cache: CacheFormat = "int8" if kind == "int8" else "float"
        models = {
            dtype: _random_model(config, dtype, int8=kind == "int8")
            for dtype in ("float32", "bfloat16")
        }

        def logits(
            dtype: str, rows: int, models: Any = models, cache: CacheFormat = cache
        ) -> np.ndarray:
            widths = [37, 1, 1, 1]
            model = models[dtype]
            return _logits_in_chunks(model, tokens[:rows], widths, SLOTS, cache)[:, 37:]

        with recorder.case(f"{kind}, {len(tokens)} rows") as row:
            exact = logits("float32", len(tokens))
            error = np.abs(logits("bfloat16", len(tokens)) - exact).max()
            row["error"] = float(error / np.abs(exact).max())
        for rows in (1, 5, 40, MAX_ROWS):
            with recorder.case(f"{kind}, {rows} rows") as row:
                is_taken = _has_layer_step(models["bfloat16"], rows)
                if is_taken != target_platform().endswith("gpu"):
                    raise AssertionError(f"is {is_taken and 'not '}made by XLA")
                actual = {"logits": logits("bfloat16", rows)}
                _compare(row, actual, {"logits": exact[:rows]}, {"logits": 2 * error})


def _has_layer_step(model: tuple[Any, Any], rows: int) -> bool:
    """Whether a decoding step has the kernels of `ops/layer_step`."""
    graph, params = model

    def step(params: Any) -> Any:
        model, ones = nnx.merge(graph, params), jnp.ones(rows, jnp.int32)
        meta = model.meta_state()
        state = model.init_state(rows, SLOTS).initialize(meta)
        return model.extend(ones[:, None], state, meta, ones)

    return "project_heads" in str(jax.make_jaxpr(step)(params))


def _random_model(config: HymbaConfig, dtype: Any, *, int8: bool) -> tuple[Any, Any]:
    """Structure and parameters, the same numbers in every dtype, as inference has them."""
    compute = ComputeConfig(dtype="bfloat16", param_dtype="bfloat16", scan_layers=False)
    params = nnx.state(Hymba(config, compute, nnx.Rngs(0)))
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype, scan_layers=False)
    graph, like = nnx.split(Hymba.abstract(config, compute))
    params = jax.tree.map(lambda a, b: a.astype(b.dtype), params, like)
    model = fuse_projections(nnx.merge(graph, params))
    return nnx.split(quantize_kernels(model) if int8 else model)


def golden(recorder: Recorder, names: str) -> None:
    """Logits, loss and the gradient of every parameter against the HF implementation."""
    for name in (QUICK,) if recorder.dry_run else names.split(","):
        with recorder.case(f"{name}: logits, loss and gradients") as row:
            golden = load(name)
            graph, params = golden.model(scan_layers=True)
            step = jax.value_and_grad(partial(_loss_and_logits, graph), has_aux=True)
            (loss, logits), gradients = jax.jit(step)(params, golden.tokens)
            actual = to_hf(gradients, golden.config, scan_layers=True)
            strides = golden.meta["grad_stride"] or {}
            actual = {n: a.reshape(-1)[:: strides.get(n, 1)] for n, a in actual.items()}
            expected = {n: a.reshape(-1) for n, a in golden.gradients.items()}
            bounds = _of_largest(GRADIENTS, expected) | dict.fromkeys(("logits", "loss"), VALUES)
            actual |= {"logits": logits, "loss": loss}
            expected |= {"logits": golden.arrays["logits"], "loss": np.asarray(golden.meta["loss"])}
            _compare(row, actual, expected, bounds)


def _loss_and_logits(graph: Any, params: Any, tokens: Any) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graph, params)
    targets = jnp.full_like(tokens, IGNORED_TARGET).at[:, :-1].set(tokens[:, 1:])
    return next_token_loss(model, Batch(tokens, targets))["loss"].mean, model(tokens)


def caches(recorder: Recorder) -> None:
    """Prefill in chunks and decoding against the HF implementation's full forward pass."""
    name = QUICK if recorder.dry_run else "tiny-ntk"
    with recorder.case(f"{name}: logits of chunks of 16 tokens and of single ones") as row:
        golden = load(name)
        inputs = golden.arrays["input_ids"].astype(np.int32)
        logits = _logits_in_chunks(golden.model(scan_layers=False), inputs, [16, 1, 1, 16, 1])
        expected = {"logits": golden.arrays["logits"][:, : logits.shape[1]]}
        _compare(row, {"logits": logits}, expected, {"logits": VALUES})
    with recorder.case(f"{name}-decode: greedy tokens") as row:
        golden = load(name)
        decoded = dict(np.load(GOLDEN / f"{name}-decode" / "golden.npz"))
        right = decoded["full_tokens"][0].tolist()
        tokens = _greedy(golden, decoded["prompt"][0].tolist(), len(right))
        row["tokens"] = len(tokens)
        if tokens != right:
            raise AssertionError(f"{tokens}, not {right}")


def _logits_in_chunks(
    model: tuple[Any, Any],
    tokens: np.ndarray,
    widths: list[int],
    slots: int = 0,
    kv_cache: CacheFormat = "float",
) -> np.ndarray:
    """Logits of the first tokens of every row, prefilled in chunks of these widths.

    Args:
      slots: of the cache, if more than the tokens.
    """
    graph, params = model
    tokens = tokens[:, : sum(widths)]

    @partial(jax.jit, static_argnames="is_start")
    def extend(params: Any, chunk: Any, cache: Any, meta: Any, *, is_start: bool) -> Any:
        model = nnx.merge(graph, params)
        lengths = jnp.full(len(chunk), chunk.shape[1])
        x, cache = model.extend(chunk, cache, meta, lengths, is_start=is_start)
        return model.logits(x), cache

    meta = jax.jit(lambda params: nnx.merge(graph, params).meta_state())(params)
    rows, length = tokens.shape
    empty = nnx.merge(graph, params).init_state(rows, max(slots, length), kv_cache=kv_cache)
    cache = empty.initialize(meta)
    logits = []
    for i, width in enumerate(widths):
        start = sum(widths[:i])
        chunk = tokens[:, start : start + width]
        part, cache = extend(params, chunk, cache, meta, is_start=i == 0)
        logits.append(np.asarray(part))
    return np.concatenate(logits, axis=1)


def _greedy(golden: Golden, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt, by the engine that generates text."""
    engine = Engine(nnx.merge(*golden.model(scan_layers=False)))
    prefilled = engine.prefill([prompt], len(prompt) + count)
    state, sampled = engine.insert(prefilled, [Request(prompt, SamplingConfig(), 0, count)])
    tokens = [*np.asarray(sampled.tokens)[0]]
    while len(tokens) < count:
        state, sampled = engine.decode(state)
        tokens += [token for token in np.asarray(sampled.tokens)[0] if token != NO_TOKEN]
    return [int(token) for token in tokens]


def _compare(
    row: dict[str, Any],
    actual: Mapping[str, Any],
    expected: Mapping[str, np.ndarray],
    bounds: Mapping[str, Any],
) -> None:
    """Adds to the row the array with the largest error relative to its bound.

    Raises:
      AssertionError: that is above 1, or names differ.
    """
    if actual.keys() != expected.keys():
        raise AssertionError(f"{sorted(actual)}, not {sorted(expected)}")
    parts = {}
    for name, exact in expected.items():
        error = np.abs(np.asarray(actual[name], np.float64) - exact)
        parts[name] = float(np.max(error / bounds[name]))
    # NaN first, as it is no number below another.
    worst = max(parts, key=lambda name: np.inf if np.isnan(parts[name]) else parts[name])
    row |= {"furthest off": worst, "of bound": parts[worst]}
    if not parts[worst] <= 1:
        raise AssertionError(f"{worst} has an error of {parts[worst]:.3g} times its bound")


def _of_largest(part: float, expected: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Bounds that are a part of each array's largest entry."""
    return {name: part * np.abs(exact).max() for name, exact in expected.items()}


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
