"""MFU, model FLOPs utilization: the share of peak throughput (PaLM, arXiv 2204.02311, app. B)."""

from collections.abc import Iterable
from typing import NamedTuple

# Dense bfloat16 FLOPs per second, from the vendors' data sheets, by JAX's name of the device.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class Workload(NamedTuple):
    """What one step computes, and on what.

    Attributes:
      tokens: predicted tokens, padding of packed rows included.
      flops: model FLOPs of the step, `training_flops`.
      devices: number of devices.
      peak_flops: FLOPs per second of all devices together; None if not in `PEAK_FLOPS`.
    """

    tokens: int
    flops: float
    devices: int
    peak_flops: float | None

    def rates(self, seconds: float, padding: float = 0.0) -> dict[str, float]:
        """The values of a metric line for steps that take this long.

        Tokens per second are without padding, as tokens seen are. `mfu` is
        flops / (seconds x peak_flops): how well the devices are used, which compute padding as they
        do tokens, so it is counted; recomputation is not.

        Args:
          padding: share of the tokens.
        """
        tokens = self.tokens * (1 - padding) / seconds
        rates = {
            "tokens_per_second": round(tokens, 1),
            "tokens_per_second_per_device": round(tokens / self.devices, 1),
        }
        if self.peak_flops is not None:
            rates["mfu"] = round(self.flops / (seconds * self.peak_flops), 4)
        return rates


def peak_flops(device_kinds: Iterable[str]) -> float | None:
    """FLOPs per second of such devices together; None where one is not in the table."""
    rates = [PEAK_FLOPS.get(kind) for kind in device_kinds]
    known = [rate for rate in rates if rate is not None]
    return sum(known) if len(known) == len(rates) else None
