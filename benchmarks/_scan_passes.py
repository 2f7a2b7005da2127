"""The passes of the selective scan at the size of Hymba-1.5B, and how their work is counted."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from _report import Row

from hymba_jax.ops.selective_scan import selective_scan

CHANNELS, STATE = 3200, 16
# What the unit for exponentials computes. The reciprocals of gates, two a position and channel at
# most, pass through it too and are not counted.
_EXPONENTIALS = {"exp", "exp2", "log", "log1p", "logistic", "tanh"}
_KERNELS = {"pallas_call", "mpmd_map"}


def passes(
    implementation: str, length: int, batch: int, dtype: str
) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Those of the selective scan."""

    def scan(*inputs: Any) -> Any:
        return selective_scan(*inputs, implementation=implementation)

    sequence = jax.ShapeDtypeStruct((batch, length, CHANNELS), dtype)
    projection = jax.ShapeDtypeStruct((batch, length, STATE), dtype)
    A = jax.ShapeDtypeStruct((STATE, CHANNELS), jnp.float32)
    D = jax.ShapeDtypeStruct((CHANNELS,), jnp.float32)
    return passes_of(scan, (sequence, sequence, A, projection, projection, D, sequence, D))


def passes_of(
    scan: Callable[..., Any], inputs: Sequence[Any]
) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Inference, the forward pass of training and the backward pass, and their inputs' shapes."""

    def forward(*inputs: Any) -> Any:
        vjp: Any
        outputs, vjp = jax.vjp(scan, *inputs)
        # Without the inputs that the backward pass shares, which would be copied.
        return outputs, vjp.opaque_residuals

    def backward(vjp: Callable[[Any], Any], cotangents: Any) -> Any:
        return vjp(cotangents)

    outputs, vjp = jax.eval_shape(lambda *inputs: jax.vjp(scan, *inputs), *inputs)
    return {
        "inference": (scan, inputs),
        "training": (forward, inputs),
        "backward": (backward, (vjp, outputs)),
    }


def compile_scans(
    compile_pass: Callable[..., Row],
    target: str,
    implementation: str,
    lengths: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
) -> list[Row]:
    """What `compile_pass` says of each pass, from its function and inputs, at each size."""
    rows: list[Row] = []
    for dtype, length, batch in product(dtypes, lengths, batches):
        row: Row = {"target": target, "dtype": dtype, "length": length, "batch": batch}
        for name, (function, inputs) in passes(implementation, length, batch, dtype).items():
            rows.append(row | {"pass": name} | compile_pass(function, inputs))
    return rows


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """All equations outside of kernels, or within one, and how often each runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        if equation.primitive.name in _KERNELS:
            continue
        trips = times * equation.params.get("length", 1)
        if equation.primitive.name == "cond":
            trips -= 1  # a kernel fetches one chunk ahead: in all trips but one
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner, trips)


def exponentials(jaxpr: Any) -> int:
    """Those of one run of a kernel's body."""
    return sum(
        times * math.prod(equation.outvars[0].aval.shape)
        for equation, times in equations(jaxpr)
        if equation.primitive.name in _EXPONENTIALS
    )


def min_exponentials(length: int, batch: int) -> int:
    """The decays, a softplus's exponential and a gate's."""
    return batch * length * CHANNELS * (STATE + 2)


def min_bytes(jaxpr: Any) -> int:
    """Every input read once, every output written once."""
    return sum(size(v.aval) for v in (*jaxpr.invars, *jaxpr.outvars))


def size(array: Any) -> int:
    """Bytes of an array that has a shape and a dtype."""
    return math.prod(array.shape) * array.dtype.itemsize
