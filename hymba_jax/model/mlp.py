"""The MLP of each block."""

from typing import ClassVar

import jax
from flax import nnx

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.model.layers import Linear
from hymba_jax.ops.gated_silu import gated_silu
from hymba_jax.parallel.mesh import constrain
from hymba_jax.types import Array, Float


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), or down(relu(up(x)) ** 2) where the config says "relu2"."""

    INPUT_PROJECTIONS: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj")

    def __init__(self, config: HymbaConfig, compute: ComputeConfig, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.mlp_size
        self.gated = config.mlp_activation == "silu"
        if self.gated:
            self.gate_proj = Linear(hidden, inner, ("hidden", "mlp"), compute, rngs)
        self.up_proj = Linear(hidden, inner, ("hidden", "mlp"), compute, rngs)
        self.down_proj = Linear(inner, hidden, ("mlp", "hidden"), compute, rngs)

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "batch length hidden"]
    ) -> Float[Array, "batch length hidden"]:
        up = self.up_proj(x)
        inner = gated_silu(self.gate_proj(x), up) if self.gated else jax.nn.relu(up) ** 2
        return self.down_proj(constrain(inner, "batch", "length", "mlp"))
