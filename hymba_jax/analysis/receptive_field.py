"""How far back the last token's output reaches: the effective receptive field (Fig. 11)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.model import Hymba
from hymba_jax.types import Array, Float, Int


class ReceptiveField(NamedTuple):
    """What the last token's output depends on.

    Attributes:
      strength: |d output / d embedding| of each token, the Frobenius norm of the Jacobian of the
        final norm's output.
      distance: mean of tokens back from the last one, weighted by strength.
    """

    strength: Float[np.ndarray, " length"]
    distance: float


def receptive_field(model: Hymba, tokens: Int[Array, " length"]) -> ReceptiveField:
    """The effective receptive field in one text.

    It takes as many backward passes as the model has hidden channels, one at a time.
    """
    graph, params = nnx.split(model)
    rows = model.embedding[...][tokens]
    squares = np.asarray(_squares(graph, params, rows), np.float64)
    strength = np.sqrt(squares)
    distance = np.arange(len(tokens))[::-1]
    return ReceptiveField(strength, float((distance * strength).sum() / strength.sum()))


@partial(jax.jit, static_argnums=0)
def _squares(
    graph: nnx.GraphDef[Hymba], params: nnx.State, rows: Float[Array, "length hidden"]
) -> Float[Array, " length"]:
    """Squared norms of the Jacobian, by token."""

    def output(rows: Float[Array, "length hidden"]) -> Float[Array, " hidden"]:
        model = nnx.merge(graph, params)
        # The sequence's embeddings in place of the vocabulary's: token i is row i.
        model.embedding = nnx.Param(rows, **model.embedding.get_metadata())
        return model.last_hidden_state(jnp.arange(len(rows))[None])[0, -1].astype(jnp.float32)

    y, pullback = jax.vjp(output, rows)
    gradients = jax.lax.map(lambda unit: jnp.square(pullback(unit)[0]).sum(-1), jnp.eye(len(y)))
    return gradients.sum(0)
