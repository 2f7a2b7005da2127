"""RMSNorm (arXiv 1910.07467), of one input and as the mean of two (paper, equation 3).

| file            | subject                                                  |
|-----------------|----------------------------------------------------------|
| `api.py`        | the ops, and which implementation they run               |
| `reference.py`  | the formula, which XLA compiles                          |
| `pallas_gpu.py` | Triton kernels that read each row once                   |
"""

from hymba_jax.ops.rms_norm.api import mean_of_norms, rms_norm, rms_norm_of_residual

__all__ = ["mean_of_norms", "rms_norm", "rms_norm_of_residual"]
