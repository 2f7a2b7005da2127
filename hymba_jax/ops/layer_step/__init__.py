"""One layer's position on GPUs, for few rows, in kernels that also compute what comes before and
after the matmuls.

A decoding step of few rows reads parameters, caches and states once and computes little, so that
starting kernels takes as long as what they do. XLA makes about 30 of a layer, these are seven with
attention's, and ten for more than 32 rows.

| file             | subject                                                           |
|------------------|-------------------------------------------------------------------|
| `projections.py` | matmuls, with what comes before and after them                    |
| `heads.py`       | the heads between their projections                               |
| `sizes.py`       | what the kernels take                                             |
"""

from hymba_jax.ops.layer_step.heads import (
    ScanParams,
    ScanSums,
    convolve_and_project,
    finish_heads,
)
from hymba_jax.ops.layer_step.projections import (
    Int8Kernel,
    Kernel,
    NormedRows,
    project_gated,
    project_heads,
    project_residual,
)
from hymba_jax.ops.layer_step.sizes import LayerSizes, takes_layer_step

__all__ = [
    "Int8Kernel",
    "Kernel",
    "LayerSizes",
    "NormedRows",
    "ScanParams",
    "ScanSums",
    "convolve_and_project",
    "finish_heads",
    "project_gated",
    "project_heads",
    "project_residual",
    "takes_layer_step",
]
