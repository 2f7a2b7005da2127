"""Text, one token after another, each from a forward pass over the whole text so far."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.types import Array, Float, Int, Key

BUFFER_STEP = 64  # texts are padded to a multiple of this, so that few lengths are compiled


def generate(
    model: Hymba,
    tokens: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that follow, up to the model's end-of-sequence token, which is not among them.

    Args:
      tokens: the prompt; an empty one begins at the start of a document.
      temperature: 0 takes the likeliest token; 1 samples from the model's distribution.

    Raises:
      HymbaError: the prompt or the sampling values make no sense for this model.
    """
    config = model.config
    text = list(tokens) or [config.bos_token_id]
    end = len(text) + max_new_tokens
    _check(model, text, max_new_tokens, temperature)
    graph, params = nnx.split(model)
    buffer = np.full((1, -(-end // BUFFER_STEP) * BUFFER_STEP), config.pad_token_id, np.int32)
    buffer[0, : len(text)] = text
    key = jax.random.key(seed)
    for length in range(len(text), end):
        logits = _next_logits(graph, params, buffer, length)
        token = int(pick(logits, jax.random.fold_in(key, length), temperature))
        if token == config.eos_token_id:
            return
        yield token
        buffer[0, length] = token


@jax.jit(static_argnums=0)
def _next_logits(
    graph: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "1 length"], length: Int[Array, ""]
) -> Float[Array, " vocab"]:
    """The logits after the first `length` tokens; what stands behind them is not seen."""
    return nnx.merge(graph, params)(tokens, text_length=length)[0, length - 1]


@jax.jit
def pick(
    logits: Float[Array, " vocab"], key: Key[Array, ""], temperature: Float[Array, ""]
) -> Int[Array, ""]:
    """A token drawn from softmax(logits / temperature), the likeliest at temperature 0."""
    sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits))


def _check(model: Hymba, text: list[int], max_new_tokens: int, temperature: float) -> None:
    config = model.config
    if max_new_tokens < 1:
        raise HymbaError(f"max_new_tokens is {max_new_tokens}, not at least 1")
    if not 0 <= temperature < float("inf"):
        raise HymbaError(f"temperature is {temperature}, not 0 or a positive number")
    if len(text) + max_new_tokens > config.max_positions:
        raise HymbaError(
            f"a prompt of {len(text)} tokens and {max_new_tokens} new ones are more than "
            f"the model's {config.max_positions} positions"
        )
    outside = [token for token in text if not 0 <= token < config.vocab_size]
    if outside:
        raise HymbaError(f"token {outside[0]} is outside the vocabulary of {config.vocab_size}")
