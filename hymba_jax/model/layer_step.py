"""A layer's next position by the kernels of `ops/layer_step`, where they take it: what
`Block.__call__` computes, with norms, gates and sums in the kernels of the matmuls.

They take the released design with projections fused for inference (`fuse.py`): attention heads and
Mamba heads whose mean is projected.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hymba_jax.model.attention import split_heads
from hymba_jax.model.context import Context
from hymba_jax.model.kv_cache import AttendedKV, KeyValue, KVCache
from hymba_jax.model.layers import (
    FusedSlice,
    Linear,
    QuantizedLinear,
    RMSNorm,
    input_projections,
)
from hymba_jax.model.mixer import HybridMixer
from hymba_jax.model.ssm import SSM, SSMState
from hymba_jax.model.state import LayerOutput, LayerState
from hymba_jax.ops.attention.step_gpu import AttentionParts, attention_parts
from hymba_jax.ops.layer_step import (
    Int8Kernel,
    Kernel,
    LayerSizes,
    NormedRows,
    ScanParams,
    convolve_and_project,
    finish_heads,
    project_gated,
    project_heads,
    project_residual,
    takes_layer_step,
)
from hymba_jax.types import Array, Float


def takes_step(
    block: Any,
    x: Float[Array, "batch length hidden"],
    context: Context,
    state: LayerState,
    shared: AttendedKV | None,
) -> bool:
    """Whether `layer_step` takes this layer with this input."""
    mixer = block.mixer
    is_decoding = x.shape[1] == 1 and context.start is not None and context.lengths is not None
    if not (is_decoding and isinstance(mixer, HybridMixer) and isinstance(mixer.ssm, SSM)):
        return False
    attention, ssm = mixer.attention, mixer.ssm
    cache = shared and shared.cache if attention.reuses_kv else state.kv
    if cache is None or state.ssm is None:
        return False
    linears = _projections(block)
    if not all(isinstance(linear, FusedSlice) for linear in linears):
        return False
    channels = linears[-1].width
    is_released_design = (
        not isinstance(attention.query_norm, RMSNorm)
        and mixer.out_proj.kernel.shape[0] == channels  # not of concatenated heads
        and (not block.has_mlp or block.mlp.gated)
    )
    before: Any = state.ssm
    return is_released_design and takes_layer_step(
        LayerSizes(
            rows=len(x),
            dtypes=(x.dtype, block.mixer_norm.scale.dtype, ssm.dt_proj.kernel.dtype),
            state_dtype=before.ssm_state.dtype,
            hidden=x.shape[2],
            channels=channels,
            inner=block.mlp.up_proj.width if block.has_mlp else 0,
            heads_of_kv=attention.num_heads // attention.num_kv_heads,
            head_dim=attention.head_dim,
            value_dim=attention.value_dim,
            cache_elements=max(leaf.size for leaf in jax.tree.leaves(cache)),
            projections=[linear.width for linear in linears],
            dt_rank=ssm.dt_norm.scale.shape[0],
            state=ssm.B_norm.scale.shape[0],
            taps=ssm.conv_kernel.shape[0],
        )
    )


def layer_step(
    block: Any,
    x: Float[Array, "batch 1 hidden"],
    context: Context,
    state: LayerState,
    meta: KVCache | None,
    shared: AttendedKV | None,
) -> LayerOutput:
    """`Block.__call__`, for a block that `takes_step` accepts."""
    mixer, rows = block.mixer, x[:, 0]
    attention = mixer.attention
    linears = _projections(block)
    *heads, ssm_input, gate = project_heads(
        _normed(rows, block.mixer_norm),
        _kernel_of(linears[0].fused),
        *(jnp.broadcast_to(a[:, 0], (len(x), a.shape[2])) for a in context.rope),
        outputs=[linear.width for linear in linears],
        rotated=1 if attention.reuses_kv else 2,
        eps=block.mixer_norm.eps,
    )
    widths = (attention.head_dim, attention.head_dim, attention.value_dim)
    query, *kv = (split_heads(a[:, None], width) for a, width in zip(heads, widths, strict=False))
    if not attention.reuses_kv:
        shared = AttendedKV.of(KeyValue(*kv), state.kv, meta)
    elif shared is None:
        raise ValueError("this layer reuses keys and values, and was given none")
    with jax.named_scope("attention"):
        query = query.reshape(len(x), attention.num_kv_heads, -1, attention.head_dim)
        parts = attention_parts(query, **shared.step_arguments(context.start, x.dtype))
    attended, y, ssm = _ssm_step(mixer.ssm, parts, ssm_input, gate, context, state.ssm)
    terms = _normed(attended, mixer.attention_norm), _normed(y, mixer.ssm_norm)
    rows = project_residual(terms, _kernel_of(mixer.out_proj), rows, eps=mixer.attention_norm.eps)
    if block.has_mlp:
        eps = block.mlp_norm.eps
        with jax.named_scope("mlp"):
            kernel = _kernel_of(block.mlp.up_proj.fused)
            inner = NormedRows(project_gated(_normed(rows, block.mlp_norm), kernel, eps=eps), None)
            rows = project_residual([inner], _kernel_of(block.mlp.down_proj), rows, eps=eps)
    return LayerOutput(rows[:, None], shared, ssm)


@jax.named_scope("ssm")
def _ssm_step(
    ssm: SSM,
    parts: AttentionParts,
    x: Float[Array, "batch channels"],
    gate: Float[Array, "batch channels"],
    context: Context,
    state: Any,
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch channels"], SSMState]:
    """The SSM heads between their projections, and the sum of the attention heads' parts."""
    lengths: Any = context.lengths
    x_proj = _kernel_of(ssm.x_proj)
    u, conv_state, sums = convolve_and_project(
        x,
        ssm.conv_kernel[...],
        ssm.conv_bias[...],
        state.conv_state.astype(x.dtype),
        lengths,
        x_proj,
        state.ssm_state.shape[1],
    )
    params = ScanParams(
        x_proj_scale=x_proj.scale if isinstance(x_proj, Int8Kernel) else None,
        dt_norm=ssm.dt_norm.scale[...],
        B_norm=ssm.B_norm.scale[...],
        C_norm=ssm.C_norm.scale[...],
        dt_proj=ssm.dt_proj.kernel[...],
        dt_bias=ssm.dt_bias[...],
        A_log=ssm.A_log[...],
        D=ssm.D[...],
    )
    attended, y, ssm_state = finish_heads(
        parts, u, gate, sums, params, state.ssm_state, lengths, eps=ssm.dt_norm.eps
    )
    return attended, y, SSMState(conv_state, ssm_state)


def _projections(block: Any) -> list[Any]:
    """The input projections of a mixer; of a fused one, its slices in their order."""
    owners = input_projections((block.mixer.attention, block.mixer.ssm))
    return [getattr(module, name) for module, name in owners]


def _kernel_of(linear: Linear | QuantizedLinear) -> Kernel:
    kernel = linear.kernel[...]
    return Int8Kernel(kernel, linear.scale[...]) if isinstance(linear, QuantizedLinear) else kernel


def _normed(rows: Float[Array, "rows features"], norm: RMSNorm) -> NormedRows:
    return NormedRows(rows, norm.scale[...])
