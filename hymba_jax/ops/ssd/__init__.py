"""The state-space dual (SSD) of Mamba2 (arXiv 2405.21060).

| implementation | what it is                                    | gradient keeps a state every |
|----------------|-----------------------------------------------|------------------------------|
| `reference`    | the definition, one position after another    | position                     |
| `chunked`      | matmuls in each chunk, the chunks in sequence | 64 positions                 |
| `pallas_gpu`   | Mosaic GPU kernels for Hopper, in bfloat16    | 64 positions                 |
| `pallas_tpu`   | a kernel for TPUs                             | 128 positions                |

All are tested against the definition, and run on shards of the length where the mesh in context
shards it (`sharded`). `ssd_step` is one position, for decoding.
"""

from hymba_jax.ops.ssd.api import ssd
from hymba_jax.ops.ssd.step import ssd_step

__all__ = ["ssd", "ssd_step"]
