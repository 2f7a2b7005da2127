"""The steps of `on_gpu.py` that ask how fast it is: medians of calls after those that warm up.

Compiling is timed apart. Programs that exceed the device's memory are skipped. Shares (`of
bandwidth`, `of exponentials`, `mfu`) are of the data sheet's rates.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _gpu_step import Recorder, Row
from _report import median_ms, peak_bytes
from attention import attend, pairs_seen
from attention import with_gradient as attention_with_gradient
from jax.sharding import Mesh
from selective_scan import associative
from selective_scan import with_gradient as scan_with_gradient

from hymba_jax.aot.fit import compiled_memory
from hymba_jax.aot.hlo import Program
from hymba_jax.aot.programs import InferencePrograms, bytes_per_device
from hymba_jax.aot.topology import CHIPS
from hymba_jax.aot.traffic import launches
from hymba_jax.checkpoint.model_file import with_vocabulary
from hymba_jax.checkpoint.train_state import abstract_train_state, init_state
from hymba_jax.config import PRESETS, AttentionConfig, HymbaConfig, SSMConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.data.batch import Batch, abstract_batch
from hymba_jax.inference.batch_state import NO_TOKEN, DecodeState, SampledTokens, StopCriteria
from hymba_jax.inference.programs import DECODE_STEPS, MIN_STOP_TOKENS
from hymba_jax.inference.sampling import SamplingConfig, make_sampler
from hymba_jax.model.flops import training_flops
from hymba_jax.model.state import ModelState
from hymba_jax.ops.attention.api import fastest
from hymba_jax.ops.platform import target_platform
from hymba_jax.ops.selective_scan import selective_scan
from hymba_jax.ops.selective_scan.api import FASTEST
from hymba_jax.ops.ssd import ssd
from hymba_jax.ops.ssd.api import fastest as fastest_ssd
from hymba_jax.parallel.mesh import batch_sharding, make_mesh
from hymba_jax.training.loss import make_loss_fn, next_token_loss
from hymba_jax.training.mfu import Workload, peak_flops
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.step import compile_train_step, make_train_step

CONFIGS = Path(__file__).parents[1] / "configs"
# Bytes per second to and from HBM, from the data sheets, by JAX's name of the device.
BANDWIDTH = {chip.kind: chip.bandwidth for chip in CHIPS.values()} | {"NVIDIA H200": 4800e9}
# Exponentials per second of a Hopper GPU: 16 a clock and multiprocessor, of which it has 132, at
# the highest clock.
EXPONENTIALS = 16 * 132 * 1.98e9
ROOM = 256  # tokens of a cache that are left to decode
TINY = HymbaConfig(
    vocab_size=64,
    hidden_size=32,
    mlp_size=48,
    layers="W",
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, window=16, rope_type="default"),
    ssm=SSMConfig(state_size=4),
    num_meta_tokens=4,
    max_positions=512,
)


def scan(recorder: Recorder) -> None:
    """A layer's scan beside its bounds and `lax.associative_scan`, 2048 positions in bfloat16.

    The bounds: every input read once and every output written once; and in every pass an
    exponential for each position, channel and state.
    """
    length, channels, state = (32, 64, 4) if recorder.dry_run else (2048, 3200, 16)
    batches = (1, 2) if recorder.dry_run else (1, 8, 32)
    kernel = FASTEST.get(target_platform(), "xla")
    with recorder.case("copy of 2 GB") as row:
        copied = jnp.ones((2_000 if recorder.dry_run else 2_000_000_000,), jnp.int8)
        compiled = _compile(row, lambda a: a + jnp.int8(1), copied)
        row["ms"] = _milliseconds(lambda: compiled(copied))
        row["GB/s"] = 2 * copied.size / row["ms"] / 1e6
        row |= _share("of bandwidth", 2 * copied.size, _bandwidth(), row["ms"])
        del copied
    for name, function in (
        (f"hymba_jax {kernel}", partial(selective_scan, implementation=kernel)),
        ("lax.associative_scan", _associative),
    ):
        for batch in batches:
            for passes in (1, 2):
                wanted = "forward" if passes == 1 else "forward and backward"
                with recorder.case(f"{name}, {batch} x {length}, {wanted}") as row:
                    dy, inputs = _scan_inputs(batch, length, channels, state)
                    if passes == 1:
                        call, arguments = function, inputs
                    else:
                        call, arguments = scan_with_gradient(function), (dy, *inputs)
                    compiled = _compile(row, call, *arguments)
                    row["ms"] = _milliseconds(partial(compiled, *arguments))
                    moved = _bytes((arguments, jax.eval_shape(call, *arguments)))
                    exponentials = passes * batch * length * channels * state
                    row |= {"MB": moved / 1e6, "1e6 exponentials": exponentials / 1e6}
                    row |= _share("of bandwidth", moved, _bandwidth(), row["ms"])
                    rate = EXPONENTIALS if _bandwidth() else None
                    row |= _share("of exponentials", exponentials, rate, row["ms"])
        # The kernel as a training step's layer uses it.
        if name.startswith("hymba_jax"):
            dy, inputs = _scan_inputs(batches[1], length, channels, state)
            both = jax.jit(scan_with_gradient(function))
            recorder.profile(partial(both, dy, *inputs))


def _scan_inputs(batch: int, length: int, channels: int, state: int) -> tuple[Any, tuple[Any, ...]]:
    """A cotangent of y; then x, dt, A, B, C, D, z and dt_bias about as training starts."""
    row = partial(_normal, batch, length)
    A = -jnp.broadcast_to(jnp.arange(1.0, state + 1)[:, None], (state, channels))
    D, dt_bias = jnp.ones(channels), jnp.full(channels, -3.0)
    inputs = (row(channels), row(channels), A, row(state), row(state), D, row(channels), dt_bias)
    return row(channels), inputs


def _associative(
    x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, dt_bias: Any
) -> tuple[jax.Array, jax.Array]:
    """The same function by a parallel prefix over the whole length, in float32."""
    x32, dt, B, C, z = (v.astype(jnp.float32) for v in (x, dt, B, C, z))
    y, state = associative(x32, dt + dt_bias, A, B, C)
    return ((y + D * x32) * jax.nn.silu(z)).astype(x.dtype), state


def attention(recorder: Recorder) -> None:
    """A layer's attention in the 1.5B, 8 x 2048 tokens behind the meta tokens, bfloat16.

    TFLOP/s are those that the mask asks for. On GPUs also cuDNN, which knows no documents.
    """
    config = TINY if recorder.dry_run else PRESETS["hymba-1.5b"]
    batch, length = (2, 32) if recorder.dry_run else (8, 2048)
    heads, meta = config.attention, config.num_meta_tokens
    row_of = partial(_normal, batch, length)
    inputs = (
        row_of(heads.num_heads, config.head_dim),
        row_of(heads.num_kv_heads, config.head_dim),
        row_of(heads.num_kv_heads, config.value_dim),
        _normal(meta, heads.num_kv_heads, config.head_dim),
        _normal(meta, heads.num_kv_heads, config.value_dim),
    )
    doutput = row_of(heads.num_heads, config.value_dim)
    chosen = fastest(*inputs[:3], None, num_meta_tokens=0, window=heads.window)
    k, v = config.head_dim, config.value_dim
    on_gpus = ("cudnn",) if target_platform().endswith("gpu") else ()
    cases = [(name, 1) for name in dict.fromkeys((chosen, *on_gpus, "blocks"))]
    cases += [(name, 4) for name in dict.fromkeys((chosen, "blocks"))]
    for name, documents in cases:
        each = length // documents
        ids = None if documents == 1 else jnp.tile(jnp.arange(length) // each, (batch, 1))
        for window in (heads.window, None):
            function = partial(attend, window=window, segment_ids=ids, implementation=name)
            seen = documents * pairs_seen(each, each, 0, window or each, meta)
            pairs = 2 * batch * heads.num_heads * seen
            # Back: the scores once more, and two matmuls for each one forward.
            passes: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
                "forward": (function, inputs, pairs * (k + v)),
                "forward and backward": (
                    attention_with_gradient(function),
                    (doutput, *inputs),
                    pairs * (4 * k + 3 * v),
                ),
            }
            for wanted, (call, arguments, flops) in passes.items():
                title = f"{name}, window {window}, {documents} documents a row, {wanted}"
                with recorder.case(title) as row:
                    compiled = _compile(row, call, *arguments)
                    row["ms"] = _milliseconds(partial(compiled, *arguments))
                    row["TFLOP/s"] = flops / row["ms"] / 1e9
    window_layer = partial(attend, window=heads.window)
    both = jax.jit(attention_with_gradient(window_layer))
    recorder.profile(partial(both, doutput, *inputs))


def ssd_layer(recorder: Recorder) -> None:
    """A layer's SSD in the Mamba2 of 1B, 8 x 2048 positions in bfloat16, beside plain XLA.

    The bound: every input read once and every output written once.
    """
    batch, length = (2, 32) if recorder.dry_run else (8, 2048)
    heads, head_dim, state = (2, 4, 4) if recorder.dry_run else (64, 64, 128)
    row_of = partial(_normal, batch, length)
    x, B = row_of(heads, head_dim), row_of(1, state)
    A, D, dt_bias = -jnp.linspace(1.0, 16.0, heads), jnp.ones(heads), jnp.full(heads, -3.0)
    inputs = (x, row_of(heads), A, B, B, D, dt_bias)
    chosen = fastest_ssd(x, B, B)
    for name in dict.fromkeys((chosen, "chunked")):

        def forward(*inputs: Any, name: str = name) -> jax.Array:
            return ssd(*inputs, implementation=name)[0]

        passes: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            "forward": (forward, inputs),
            "forward and backward": (attention_with_gradient(forward), (x, *inputs)),
        }
        for wanted, (call, arguments) in passes.items():
            with recorder.case(f"{name}, {batch} x {length}, {wanted}") as row:
                compiled = _compile(row, call, *arguments)
                row["ms"] = _milliseconds(partial(compiled, *arguments))
                moved = _bytes((arguments, jax.eval_shape(call, *arguments)))
                row |= {"MB": moved / 1e6}
                row |= _share("of bandwidth", moved, _bandwidth(), row["ms"])
        if name == chosen:
            both = jax.jit(attention_with_gradient(forward))
            recorder.profile(partial(both, x, *inputs))


def train(recorder: Recorder, config: str) -> None:
    """The whole step of a run of configs/ with 8 sequences of its length, optimizer included."""
    run = _training_run(config, recorder.dry_run)
    device, training, length = jax.devices()[0], run.training, run.data.sequence_length
    mesh = make_mesh([device], run.parallel)
    optimizer = make_optimizer(run.training)
    abstract = abstract_train_state(run.model, run.compute, optimizer, mesh)
    place = batch_sharding(mesh)
    shape = (training.batch_size, length)
    with recorder.case("compile") as row:
        row |= {"parameters": abstract.num_params, "batch": f"{shape[0]} x {shape[1]}"}
        row |= {"dtype": run.compute.dtype, "remat": run.compute.remat}
        loss_fn = make_loss_fn(next_token_loss, abstract.graph)
        train_step = make_train_step(loss_fn, optimizer, micro_batch_size=training.micro_batch_size)
        start = time.perf_counter()
        step = compile_train_step(train_step, abstract.state, abstract_batch(*shape, place))
        row["compile s"] = time.perf_counter() - start
        _check_memory(row, step)
    if recorder.failed:
        return
    with recorder.case("initialize parameters"):
        state = init_state(run.model, run.compute, optimizer, abstract, run.seed)
        jax.block_until_ready(state)
    if recorder.failed:
        return
    tokens = np.random.default_rng(0).integers(3, run.model.num_embeddings, shape, np.int32)
    batch = jax.device_put(Batch(inputs=tokens, targets=tokens), place)

    def one_step() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    with recorder.case("step") as row:
        row["loss"] = float(one_step()["loss"].mean)
        row["ms"] = median_ms(one_step, warmup=1, repeats=3 if recorder.dry_run else 8)
        flops = shape[0] * training_flops(run.model, length)
        workload = Workload(math.prod(shape), flops, 1, peak_flops([device.device_kind]))
        row |= workload.rates(row["ms"] / 1e3)
        row |= {"peak GB": peak_bytes() / 1e9, "last loss": float(one_step()["loss"].mean)}
    recorder.profile(one_step, times=2)


def _training_run(config: str, dry_run: bool) -> RunConfig:
    run = with_vocabulary(RunConfig.from_toml(CONFIGS / config)).resolved_stages[0].run
    training = dataclasses.replace(run.training, batch_size=8, gradient_accumulation_steps=1)
    model = dataclasses.replace(run.model, vocab_size=PRESETS["hymba-1.5b"].vocab_size)
    compute = dataclasses.replace(run.compute, scan_layers=True)  # compiled within the time limit
    run = dataclasses.replace(
        run, model=model, compute=compute, parallel=ParallelConfig(), training=training
    )
    if dry_run:
        data = dataclasses.replace(run.data, sequence_length=32)
        run = dataclasses.replace(run, model=TINY, data=data)
    return run


def decode(recorder: Recorder, sequences: str) -> None:
    """The engine's loop over tokens for so many sequences of 8k tokens, 1.5B in bfloat16.

    Only the number of tokens in the caches matters for time, so it is set: parameters and caches
    are random, there is no prefill. `GB` is the minimal HBM traffic of a decoding step: parameters,
    keys, values and states read once, states written once.
    """
    config = TINY if recorder.dry_run else PRESETS["hymba-1.5b"]
    batch = min(int(sequences), 2) if recorder.dry_run else int(sequences)
    context = config.max_positions
    mesh = Mesh(np.array(jax.devices()[:1]), ("chip",))
    with recorder.case(f"compile, {batch} x {context}") as row:
        programs = InferencePrograms(config, mesh, "bfloat16", "float32")
        traced = programs.decode(batch, context)
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            compiled = traced.program.lower().compile()
        row["compile s"] = time.perf_counter() - start
        program = Program(compiled.as_text())
        row["kernels per step"] = launches(program, program.largest_loop())
        _check_memory(row, compiled)
    if recorder.failed:
        return
    with recorder.case("fill parameters and caches"):
        arguments = [_decode_argument(shapes, batch, context) for shapes in traced.arguments]
        jax.block_until_ready(arguments)
    if recorder.failed:
        return
    (at,) = (i for i, value in enumerate(arguments) if isinstance(value, DecodeState))

    def some_tokens() -> SampledTokens:
        arguments[at], sampled = compiled(*arguments)
        return sampled

    with recorder.case("decode") as row:
        row["ms"] = (
            median_ms(some_tokens, warmup=1, repeats=3 if recorder.dry_run else 8) / DECODE_STEPS
        )
        moved = bytes_per_device(traced.read) + bytes_per_device(traced.written)
        row |= {"tokens_per_second": 1e3 * batch / row["ms"], "GB": moved / 1e9}
        row |= _share("of bandwidth", moved, _bandwidth(), row["ms"])
        row |= {"peak GB": peak_bytes() / 1e9, "stopped": int(arguments[at].stopped.sum())}
    recorder.profile(some_tokens, times=2)


def _decode_argument(shapes: Any, batch: int, context: int) -> Any:
    """Values for an argument of the loop: random parameters and caches, filled but for `ROOM`."""

    def full(value: int, *shape: int) -> jax.Array:  # new each time, as the state is donated
        return jnp.full((batch, *shape), value, jnp.int32)

    match shapes:
        case DecodeState():
            cache = ModelState(_random(shapes.cache.layers), full(context - ROOM))
            values: Any = DecodeState(
                cache=cache,
                token=full(0),
                num_sampled=full(0),
                stopped=full(0) > 0,
                seen=jnp.zeros(shapes.seen.shape, bool),
                counts=jnp.zeros(shapes.counts.shape, jnp.int32),
                bias=jnp.zeros(shapes.bias.shape),
                alternatives=full(0) > 0,
                sampler=make_sampler([SamplingConfig()] * batch, range(batch)),
                stop=StopCriteria(full(context), full(NO_TOKEN, MIN_STOP_TOKENS)),
            )
        case jax.ShapeDtypeStruct():  # the steps of a call
            values = jnp.full(shapes.shape, DECODE_STEPS, shapes.dtype)
        case _:
            values = _random(shapes)
    return jax.device_put(values, jax.tree.map(lambda a: a.sharding, shapes))


def _random(shapes: Any) -> Any:
    return jax.tree.map(lambda a: 0.02 * _normal(*a.shape, dtype=a.dtype), shapes)


def _normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, dtype)


def _compile(row: Row, function: Callable[..., Any], *arguments: Any) -> Any:
    """The compiled function; the row gets how long that took and what memory it needs."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    row["lower s"] = time.perf_counter() - start
    compiled = lowered.compile()
    row["compile s"] = time.perf_counter() - start - row["lower s"]
    _check_memory(row, compiled)
    return compiled


def _check_memory(row: Row, compiled: Any) -> None:
    """Adds what a program needs.

    Raises:
      MemoryError: the device has less.
    """
    memory = compiled_memory(compiled)
    row |= {"temporaries GB": memory.temporaries / 1e9, "total GB": memory.total / 1e9}
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if memory.total > limit:
        raise MemoryError(f"needs {memory.total / 1e9:.1f} GB, of {limit / 1e9:.1f}: not run")


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median of calls: of short ones many, which are begun before the last is waited for."""
    once = median_ms(call, warmup=1, repeats=1)
    together = max(1, min(20, round(20 / once)))
    repeats = max(3, min(10, round(1000 / (once * together))))
    return median_ms(call, warmup=1, repeats=repeats, together=together)


def _bandwidth() -> float | None:
    return BANDWIDTH.get(jax.devices()[0].device_kind)


def _share(name: str, amount: float, rate: float | None, milliseconds: float) -> Row:
    """The least time for an amount at a rate, as a fraction of the time; empty without a rate."""
    return {} if rate is None else {name: 1e3 * amount / rate / milliseconds}


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
