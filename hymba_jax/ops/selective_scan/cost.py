"""What the kernels of the selective scan, for GPUs and for TPUs, say that they cost.

The unit for exponentials, or what goes with each, bounds them. Kernels for TPUs have matmuls, too.
"""

from jax.experimental import pallas as pl

from hymba_jax.ops.kernel_cost import kernel_cost


def forward_cost(entries: int, states: int, hbm_bytes: int, flops: int = 0) -> pl.CostEstimate:
    """Of one call: a decay for each state, the softplus and the gate.

    Args:
      entries: positions of all rows, times channels.
      states: of a channel.
      hbm_bytes, flops: as of `kernel_cost`.
    """
    return kernel_cost(flops, entries * (states + 2), hbm_bytes)


def backward_cost(entries: int, states: int, hbm_bytes: int, flops: int = 0) -> pl.CostEstimate:
    """Of one call: decays for the recomputed states and for the walk back, and three others."""
    return kernel_cost(flops, entries * (2 * states + 3), hbm_bytes)
