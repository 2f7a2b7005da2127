"""FLOPs of the matmuls in a compiled program, two for a multiplication and its addition.

Kernels (custom calls) are not included.
"""

import math
import re
from itertools import product

from hymba_jax.aot.hlo import Instruction, Program

_LIBRARY_MATMUL = r'"lhs_contracting_dimensions":\[([\d",]*)\]'


def instruction_flops(program: Program, line: Instruction) -> int:
    """FLOPs of an instruction; 0 unless it is a matmul."""
    if line.op == "dot":
        return _of_dot(program, line, r"lhs_contracting_dims=\{([\d,]*)\}")
    if line.op == "custom-call" and re.search(_LIBRARY_MATMUL, line.attributes):
        return _of_dot(program, line, _LIBRARY_MATMUL)
    return _of_convolution(program, line) if line.op == "convolution" else 0


def _of_dot(program: Program, line: Instruction, contracting: str) -> int:
    left = program.arrays[line.operands[0]][0].shape
    found = re.search(contracting, line.attributes)
    summed = [left[int(axis)] for axis in re.findall(r"\d+", found[1] if found else "")]
    return 2 * math.prod((*line.results[0].shape, *summed))


def _of_convolution(program: Program, line: Instruction) -> int:
    """TPUs' matmuls are convolutions, of batches over spatial axes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    assert labels is not None
    left, right, out = (
        dict(zip(names, array.shape, strict=True))
        for names, array in zip(
            labels.groups(),
            (*(program.arrays[name][0] for name in line.operands[:2]), line.results[0]),
            strict=True,
        )
    )
    pairs = 2 * out["b"] * out["f"] * right["i"]
    for axis in (name for name in out if name.isdigit()):
        window = _window(line.attributes, int(axis))
        pairs *= _num_valid_taps(left[axis], right[axis], out[axis], **window)
    return pairs


def _window(attributes: str, axis: int) -> dict[str, int]:
    """Padding before the input, and steps, of a convolution along one axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}

    def value(name: str, default: str) -> int:
        return int(fields[name].split("x")[axis].split("_")[0]) if name in fields else int(default)

    return {
        "padding_low": value("pad", "0"),
        "stride": value("stride", "1"),
        "lhs_dilation": value("lhs_dilate", "1"),
        "rhs_dilation": value("rhs_dilate", "1"),
    }


def _num_valid_taps(
    left: int,
    right: int,
    out: int,
    *,
    padding_low: int,
    stride: int,
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    """Number of kernel taps applied to real input, not to padding or dilation holes."""
    taps = product(range(out), range(right))
    positions = (o * stride + k * rhs_dilation - padding_low for o, k in taps)
    last = (left - 1) * lhs_dilation
    return sum(0 <= p <= last and p % lhs_dilation == 0 for p in positions)
