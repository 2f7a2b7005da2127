"""What the kernels of a layer's position take."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from hymba_jax.ops.attention.step_gpu import supports as attention_supports
from hymba_jax.ops.causal_conv.step_gpu import supports as conv_supports
from hymba_jax.ops.layer_step.projections import MAX_ROWS, MIN_TILE
from hymba_jax.ops.platform import target_platform
from hymba_jax.parallel.mesh import is_partitioned

_MULTIPLE = 32  # of a matmul's features
_MAX_SELECTION = 256  # widths of dt, B and C, of which a program has whole rows in registers


class LayerSizes(NamedTuple):
    """Sizes that decide whether the kernels can compute a layer.

    Attributes:
      dtypes: of rows and parameters.
      inner: of the MLP, 0 where there is none.
      heads_of_kv: query heads that share a key/value head.
      cache_elements: of the cached keys or values, whichever are more.
      projections: columns of each input projection.
      taps: of the convolution.
    """

    rows: int
    dtypes: Sequence[DTypeLike]
    state_dtype: DTypeLike
    hidden: int
    channels: int
    inner: int
    heads_of_kv: int
    head_dim: int
    value_dim: int
    cache_elements: int
    projections: Sequence[int]
    dt_rank: int
    state: int
    taps: int


def takes_layer_step(sizes: LayerSizes) -> bool:
    """Whether the kernels take such a layer, on the platform that is traced for: few rows of 16
    bits on one GPU, and sizes that Triton has."""
    return (
        target_platform().endswith("gpu")
        and not is_partitioned()
        and sizes.rows <= MAX_ROWS
        and len({jnp.dtype(dtype) for dtype in sizes.dtypes}) == 1
        and jnp.dtype(sizes.state_dtype) == jnp.float32
        and attention_supports(
            sizes.dtypes[0],
            sizes.heads_of_kv,
            sizes.head_dim,
            sizes.value_dim,
            sizes.cache_elements,
        )
        and 32 <= sizes.head_dim <= 128
        and not any(columns % sizes.head_dim for columns in sizes.projections)
        and not any(size % _MULTIPLE for size in (sizes.hidden, sizes.channels, sizes.inner))
        and MIN_TILE <= sizes.state <= _MAX_SELECTION
        and sizes.state & (sizes.state - 1) == 0
        and sizes.dt_rank <= _MAX_SELECTION
        and conv_supports(sizes.channels, sizes.taps)
    )
