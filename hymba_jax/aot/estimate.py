"""Bounds of a step's time on a chip, from its data sheet, and the assumptions behind estimates."""

from typing import NamedTuple

from hymba_jax.aot.topology import Chip


class Work(NamedTuple):
    """Cost of one step on one chip.

    Attributes:
      flops: of matmuls, those in kernels included.
      hbm_bytes: read and written.
      collective_bytes: sent to other chips.
    """

    flops: float
    hbm_bytes: float
    collective_bytes: float

    def seconds(self, chip: Chip) -> dict[str, float]:
        """How long each would take by itself at the chip's full rate.

        A step takes as long as the longest if the others hide behind it, and never less.
        """
        return {
            "arithmetic": self.flops / chip.peak_flops,
            "memory": self.hbm_bytes / chip.bandwidth,
            "interconnect": self.collective_bytes / chip.interconnect,
        }


def assumptions(chip: Chip) -> str:
    """Assumptions of an estimate, in words."""
    of_kernels = (
        "the cycles of their compiled schedules"
        if chip.is_tpu
        else "their exponentials and shared-memory traffic"
    )
    return (
        f"estimated for a chip with {chip.peak_flops / 1e12:,.0f} TFLOP/s in bfloat16, "
        f"{chip.bandwidth / 1e9:,.0f} GB/s of HBM bandwidth and "
        f"{chip.interconnect / 1e9:,.0f} GB/s over all its links (data sheet), each at its full "
        "rate. Lower bound: all at once, so that a step takes the longest of the three or more. "
        "Estimated: one instruction after another, each for the longest of its FLOPs, its HBM "
        f"bytes and, of our kernels, {of_kernels}. Asynchronous copies add what does not hide "
        "behind instructions that compute; collectives run beside all of it"
    )
