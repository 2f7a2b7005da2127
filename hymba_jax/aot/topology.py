"""Slices of accelerators by name, and devices to compile for ahead of time."""

import math
import os
import re
from importlib import import_module
from typing import NamedTuple

import jax
from jax.experimental import topologies

from hymba_jax.config.field_types import shown
from hymba_jax.errors import HymbaError
from hymba_jax.training.mfu import PEAK_FLOPS


class Chip(NamedTuple):
    """Data-sheet numbers of a chip.

    Attributes:
      kind: JAX's name of the device.
      memory: bytes of HBM.
      bandwidth: bytes per second to and from HBM.
      interconnect: bytes per second that the chip can send to others, over all its links.
    """

    kind: str
    memory: float
    bandwidth: float
    interconnect: float

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.kind]

    @property
    def is_tpu(self) -> bool:
        return self.kind.startswith("TPU")


CHIPS = {
    "v5e": Chip("TPU v5 lite", 16e9, 819e9, 200e9),
    "v5p": Chip("TPU v5", 95e9, 2765e9, 600e9),
    "v6e": Chip("TPU v6 lite", 32e9, 1640e9, 400e9),
    "h100": Chip("NVIDIA H100 80GB HBM3", 80e9, 3350e9, 450e9),
}
GPUS_PER_HOST = 8
MAX_CHIPS = 2**14  # several times the largest slice that there is

# XLA's target description of an H100 (SXM, 80 GB).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Topology(NamedTuple):
    """A slice of chips, as it is named: `v5e:16x16`, `h100:8`."""

    name: str
    chip: Chip

    def devices(self) -> list[jax.Device]:
        """Its devices, which compile and do nothing else.

        Raises:
          HymbaError: its compiler is not installed, or knows no such slice.
        """
        try:
            return _tpus(self.name) if self.chip.is_tpu else _gpus(self.name)
        except ModuleNotFoundError as error:
            extra = "tpu" if self.chip.is_tpu else "cuda13"
            raise HymbaError(
                f"{self.name}: its compiler is not installed, pip install -e '.[{extra}]' in the "
                "repository"
            ) from error
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise HymbaError(f"{self.name}: the compiler knows no such slice ({reason})") from error


def parse_topology(name: str) -> Topology:
    """The slice of this name.

    Raises:
      HymbaError: it is not the name of one.
    """
    named = re.fullmatch(r"(\w+):([1-9][0-9]*(?:x[1-9][0-9]*){0,2})", name)
    if named is None:
        raise HymbaError(f"topology is {shown(name)}, not a chip and a shape such as v5e:16x16")
    if named[1] not in CHIPS:
        raise HymbaError(f"topology {name}: there is no {named[1]!r}, only {', '.join(CHIPS)}")
    chip, sizes = CHIPS[named[1]], named[2].split("x")
    count = math.prod(int(size[:9]) for size in sizes)  # enough to be too many
    if count > MAX_CHIPS:
        raise HymbaError(f"topology {shown(name)}: no slice has more than {MAX_CHIPS} chips")
    if not chip.is_tpu and (len(sizes) > 1 or count > GPUS_PER_HOST):
        raise HymbaError(
            f"topology {name}: only the GPUs of one host are supported, "
            f"{named[1]}:1 to {named[1]}:{GPUS_PER_HOST}"
        )
    return Topology(name, chip)


def without_a_tpu(options: str = "") -> None:
    """Lets libtpu compile without a TPU. Its options are read once."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": options,
    }


def _tpus(name: str) -> list[jax.Device]:
    import_module("libtpu")
    without_a_tpu()
    return list(topologies.get_topology_desc(name, platform="tpu").devices)


def _gpus(name: str) -> list[jax.Device]:
    import_module("jax_plugins.xla_cuda13")  # before JAX looks for devices
    count = name.partition(":")[2]
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology=f"1x1x{count}"
    )
    return list(topology.devices)
