"""Fused matmuls equal separate ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_weights
from slow import slow_but

from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig
from hymba_jax.model import Hymba, fuse_projections, unstack_layers

TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 50, (2, 24)))


@pytest.mark.parametrize(
    ("layers", "activation"),
    slow_but(
        [("G 2*Ww", "silu"), ("2*W M Aa", "relu2"), ("S- S L-", "silu")], ("2*W M Aa", "relu2")
    ),
)
def test_fused_matmuls_equal_separate_ones(layers, activation):
    """To float32 rounding: the columns of a matmul may be added up in another order."""
    config = HymbaConfig(
        vocab_size=50,
        hidden_size=32,
        mlp_size=48,
        layers=layers,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=5, rope_type="default"),
        num_meta_tokens=3,
        mlp_activation=activation,
    )
    model = unstack_layers(Hymba(config, ComputeConfig(), nnx.Rngs(0)))
    expected = jax.jit(lambda model, tokens: model(tokens))(model, TOKENS)
    before = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    fused = fuse_projections(model)
    graph, params = nnx.split(fused)
    run = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
    np.testing.assert_allclose(run(params, TOKENS), expected, rtol=0, atol=1e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == before


def test_input_projections_are_one_matmul():
    """Five kernels read the mixer's input and two the MLP's; compiled, one each. CPUs
    are compiled for: other platforms name matmuls differently."""
    config = HymbaConfig(
        vocab_size=50,
        hidden_size=32,
        mlp_size=48,
        layers="W",
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=5, rope_type="default"),
        num_meta_tokens=0,  # whose own pass has the same matmuls
    )

    def count_matmuls(model):
        graph, params = nnx.split(model)
        run = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
        params = jax.device_put(params, jax.devices("cpu")[0])
        text = run.lower(params, np.asarray(TOKENS)).compile().as_text()
        kernels = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
        return sum(shape[0] == 32 and shape != (50, 32) for shape in kernels), text.count(" dot(")

    model = nnx.merge(*random_weights(config, scan_layers=False))
    kernels, dots = count_matmuls(model)
    fused_kernels, fused_dots = count_matmuls(fuse_projections(model))
    assert kernels - fused_kernels == dots - fused_dots == 5
