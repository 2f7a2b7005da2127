"""Attention with a sliding window and meta tokens (paper, sections 2.2 and 2.4).

| implementation | what it is                                                         |
|----------------|--------------------------------------------------------------------|
| `reference`    | the definition, with all weights in memory                         |
| `blocks`       | plain XLA, a block of queries and of keys at a time                |
| `pallas_tpu`   | kernels for TPUs                                                   |
| `cudnn`        | NVIDIA's kernels, for whole sequences in 16 bits                   |
| `pallas_gpu`   | our kernels for Hopper, in bfloat16                                |

All but the first take time and memory in proportion to the unmasked blocks: linear in the length
with a window. Where the mesh in context shards the length (`sharded`), all but `cudnn` can run on
the shards. All but `cudnn`, whose mask cannot express "own document or meta
token", support `segment_ids`. `attention_step` is one new token, for decoding.
"""

from hymba_jax.ops.attention.api import attention
from hymba_jax.ops.attention.step import attention_step

__all__ = ["attention", "attention_step"]
