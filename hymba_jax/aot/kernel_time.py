"""How long kernels take by their own instructions, where matmul throughput does not bound them.

The selective scan runs on the vector unit. On TPUs it is charged the cycles of the
schedule that libtpu gives it, on GPUs its exponentials at the rate of the unit that has them; both
are printed by `python benchmarks/compile_scan.py`. Kernels that are not named here, those of
attention, are charged their FLOPs at peak throughput elsewhere (`cost.py`).
"""

import math

from hymba_jax.aot.hlo import Instruction, Program
from hymba_jax.aot.kernels import kernel_name
from hymba_jax.aot.topology import Chip

CLOCKS = {"TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v6 lite": 1.75e9}
"""Cycles per second: peak FLOP/s over those of a cycle in the matrix units."""

EXPONENTIALS_PER_SECOND = {"NVIDIA H100 80GB HBM3": 132 * 16 * 1.98e9}
"""16 a cycle on each of 132 multiprocessors."""

SCAN_CYCLES = {
    "TPU v5 lite": {"selective_scan_forward": 45.1, "selective_scan_backward": 120.8},
    "TPU v6 lite": {"selective_scan_forward": 45.6, "selective_scan_backward": 110.8},
}
"""Per position, 640 channels and 16 states; a v5p is charged those of a v5e."""

SCAN_EXPONENTIALS = {"selective_scan_forward": 1.0, "selective_scan_backward": 1.94}
"""Per position, channel and state, of which the softplus and the gate count as two."""


def kernel_seconds(program: Program, line: Instruction, chip: Chip) -> float:
    """One call of the selective scan; 0 for other kernels."""
    name = kernel_name(line)
    if name not in SCAN_EXPONENTIALS:
        return 0.0
    positions, channels, states = _sizes(program, line)
    if not chip.is_tpu:
        each = SCAN_EXPONENTIALS[name] * channels * (states + 2)
        return positions * each / EXPONENTIALS_PER_SECOND[chip.kind]
    cycles = SCAN_CYCLES.get(chip.kind, SCAN_CYCLES["TPU v5 lite"])[name]
    tiles = channels * states / (640 * 16)
    return positions * tiles * cycles / CLOCKS[chip.kind]


def _sizes(program: Program, line: Instruction) -> tuple[int, int, int]:
    """Positions of all rows, channels and states: x comes first, A is the first matrix."""
    arrays = [program.arrays[name][0] for name in line.operands]
    *rows, channels = next(a.shape for a in arrays if len(a.shape) == 3)
    A = next(a.shape for a in arrays if len(a.shape) == 2 and channels in a.shape)
    return math.prod(rows), channels, math.prod(A) // channels
