"""The selective state-space scan of Mamba (arXiv 2312.00752).

| implementation | what it is                                      | gradient keeps a state every |
|----------------|-------------------------------------------------|------------------------------|
| `reference`    | the definition, one position after another      | position                     |
| `xla`          | a loop, for CPUs                                | 16 positions                 |
| `associative`  | a parallel prefix in each chunk                 | 32 positions                 |
| `pallas_gpu`   | Mosaic GPU kernels, from Hopper on              | 64 positions                 |
| `pallas_tpu`   | Mosaic TPU kernels                              | 256 positions                |

All of them pass one suite of tests, and run on shards of the length where the mesh in context
shards it (`sharded`). `selective_scan_step` is one position, for decoding.
"""

from hymba_jax.ops.selective_scan.api import selective_scan
from hymba_jax.ops.selective_scan.step import selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
