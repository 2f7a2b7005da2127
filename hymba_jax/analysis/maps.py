"""Which positions each position takes from: attention, and the scan of Mamba heads written as
attention (arXiv 2403.01590) beside it (Fig. 6).

Positions count the meta tokens, which come first. One layer's map is computed at a time.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from hymba_jax.analysis.layer_inputs import LayerInputs, attention_heads, over_layers
from hymba_jax.model import Hymba
from hymba_jax.model.context import Context
from hymba_jax.model.ssm import SSM
from hymba_jax.types import Array, Float, Int

_ROWS = 64  # whose coefficients are in memory at once


def attention_maps(
    model: Hymba, tokens: Int[Array, "batch length"]
) -> Iterator[Float[Array, "batch heads positions positions"] | None]:
    """The weights of each layer's attention heads, first layer first; None of a layer without
    them."""
    return over_layers(model, tokens, _attention_map)


def _attention_map(
    mixer: nnx.Module, inputs: LayerInputs
) -> Float[Array, "batch heads positions positions"] | None:
    attention = attention_heads(mixer)
    return None if attention is None else attention.weights(inputs.x, inputs.rope, inputs.kv)


def ssm_maps(
    model: Hymba, tokens: Int[Array, "batch length"]
) -> Iterator[Float[Array, "batch positions positions"] | None]:
    """The map of each layer's Mamba heads, first layer first; None of a layer without them.

    Entry (t, s) is the sum over channels of |alpha[t, s]|, where the scan is
    y_t = sum over s <= t of alpha[t, s] u_s, D and gate left out, and

        alpha[t, s] = sum_n C_t[n] exp(A[n] sum_{s < k <= t} dt_k) dt_s B_s[n]
    """
    return over_layers(model, tokens, _ssm_map)


def _ssm_map(
    mixer: nnx.Module, inputs: LayerInputs
) -> Float[Array, "batch positions positions"] | None:
    ssm = getattr(mixer, "ssm", None)
    if not isinstance(ssm, SSM):
        return None
    scan = ssm.scan_inputs(inputs.x, Context(inputs.rope), None)
    dt = jax.nn.softplus(scan.dt.astype(jnp.float32) + ssm.dt_bias[...][None, None])
    elapsed = jnp.cumsum(dt, axis=1)
    B, C = (array.astype(jnp.float32) for array in (scan.B, scan.C))
    batch, length = dt.shape[:2]
    positions = jnp.arange(length)

    def rows(start: Int[Array, ""]) -> Float[Array, "rows batch positions"]:
        """Some rows of the map, a channel at a time."""
        at = jnp.minimum(start + jnp.arange(_ROWS), length - 1)
        causal = (positions[None] <= at[:, None])[None]

        def add_channel(total: Array, channel: tuple[Array, ...]) -> tuple[Array, None]:
            elapsed, dt, A = channel  # (batch, positions) twice, and (state,)
            between = elapsed[:, at, None] - elapsed[:, None]
            exponents = jnp.where(causal, between, 0.0)[..., None] * A[None, None, None]
            alpha = jnp.einsum("btn,btsn,bsn->bts", C[:, at], jnp.exp(exponents), B)
            return total + jnp.where(causal, jnp.abs(alpha * dt[:, None]), 0.0), None

        channels = jnp.moveaxis(elapsed, -1, 0), jnp.moveaxis(dt, -1, 0), -jnp.exp(ssm.A_log[...]).T
        total, _ = jax.lax.scan(add_channel, jnp.zeros((batch, _ROWS, length)), channels)
        return total.swapaxes(0, 1)

    of_rows = jax.lax.map(rows, jnp.arange(0, length, _ROWS))
    return of_rows.reshape(-1, batch, length)[:length].swapaxes(0, 1)
