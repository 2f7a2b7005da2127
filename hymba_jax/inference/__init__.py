"""From a trained model to text."""

from hymba_jax.inference.decoding import generate
from hymba_jax.inference.loading import load

__all__ = ["generate", "load"]
