"""How long kernels take by their own instructions, where matmul throughput does not bound them.

Kernels say how many exponentials they compute (`ops/kernel_cost.py`). On TPUs the cycles of their
schedules, which libtpu gives them, are charged for these; `python benchmarks/compile_scan.py`,
`compile_ssd.py` and `compile_attention.py` print them. On GPUs exponentials and what passes through
shared memory are charged at the rates of their units.
"""

from hymba_jax.aot.hlo import Instruction
from hymba_jax.aot.kernels import kernel_name, stated_cost
from hymba_jax.aot.topology import Chip

CLOCKS = {"TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v6 lite": 1.75e9}
"""Cycles per second: peak FLOP/s over those of a cycle in the matrix units."""

CYCLES = {
    "TPU v5 lite": {
        "selective_scan_forward": 2.44,
        "selective_scan_backward": 3.34,
        "attention_forward": 5.86,
        "attention_backward": 10.3,
        "ssd_forward": 8.17,
        "ssd_backward": 14.2,
    },
    "TPU v6 lite": {
        "selective_scan_forward": 2.46,
        "selective_scan_backward": 3.16,
        "attention_forward": 4.58,
        "attention_backward": 6.42,
        "ssd_forward": 7.08,
        "ssd_backward": 13.5,
    },
}
"""Per 1024 exponentials in bfloat16, at the sizes of the 1.5B, of SSD at those of the 1B; a v5p is
charged those of a v5e. In float32, scan and SSD take two to four times as many."""

EXPONENTIALS_PER_SECOND = {"NVIDIA H100 80GB HBM3": 132 * 16 * 1.98e9}
"""16 a cycle on each of 132 multiprocessors."""

SHARED_BYTES_PER_SECOND = {"NVIDIA H100 80GB HBM3": 132 * 128 * 1.98e9}
"""128 a cycle on each."""

SHARED_BYTES = {
    "attention_forward": 10,
    "attention_backward_query": 14,
    "attention_backward_key_value": 21,
}
"""Per exponential, heads of 64 and values of 128: what matrix instructions of 64 rows read, and,
once for both warpgroups, what is fetched."""


def kernel_seconds(line: Instruction, chip: Chip) -> float:
    """One call of a kernel; 0 for those whose instructions are not known here."""
    name, exponentials = kernel_name(line), stated_cost(line).exponentials
    if chip.is_tpu:
        cycles = CYCLES.get(chip.kind, CYCLES["TPU v5 lite"]).get(name, 0.0)
        return exponentials / 1024 * cycles / CLOCKS[chip.kind]
    shared = exponentials * SHARED_BYTES.get(name, 0)
    return max(
        exponentials / EXPONENTIALS_PER_SECOND[chip.kind],
        shared / SHARED_BYTES_PER_SECOND[chip.kind],
    )
