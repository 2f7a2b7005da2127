"""Kernels in 8 bits against NumPy, and a model with them against the full forward pass of one
with the same values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inference.models import TINY, byte_tokenizer, make_model

from hymba_jax.inference import LanguageModel
from hymba_jax.ops.int8_matmul import int8_matmul, quantize


def numpy_quantized(kernel):
    """The values that 8 bits and a scale for each output leave of a kernel."""
    kernel = np.asarray(kernel, np.float64)
    scale = np.abs(kernel).max(0) / 127
    return np.rint(kernel / scale) * scale


@pytest.mark.parametrize(
    "shape", [(1, 24), (1, 1, 24), (24,), (3, 5, 24), (17, 24), (1, 21)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products(shape, dtype):
    """Few rows, which have a loop of their own, and more; sums differ by float32 roundings."""
    rng = np.random.default_rng(0)
    kernel, scale = rng.integers(-127, 128, (shape[-1], 40)), rng.uniform(0.1, 2, 40)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    y = int8_matmul(x, jnp.asarray(kernel, jnp.int8), jnp.asarray(scale, jnp.float32))
    assert (y.dtype, y.shape) == (x.dtype, (*shape[:-1], 40))
    expected = np.asarray(x, np.float64) @ (kernel * scale)
    eps = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
    bound = eps * (np.abs(np.asarray(x, np.float64)) @ np.abs(kernel * scale)) + 1e-30
    assert (np.abs(np.asarray(y, np.float64) - expected) <= bound).all()


def test_rounding():
    """To nearest; a column of zeros stays."""
    kernel = np.random.default_rng(1).normal(size=(30, 6)).astype(np.float32)
    kernel[:, 2] = 0
    integers, scale = quantize(jnp.asarray(kernel))
    assert integers.dtype == jnp.int8
    assert (np.abs(integers).max(0) == [127, 127, 0, 127, 127, 127]).all()
    error = np.abs(np.asarray(integers, np.float64) * np.asarray(scale, np.float64) - kernel)
    assert (error <= np.asarray(scale) * 0.5001).all()


def test_a_model_has_the_quantized_values():
    """All kernels but that of dt, in prefill and in decoding, against the full forward pass."""
    config = dataclasses.replace(TINY, layers="G", tie_embeddings=False)
    quantized = LanguageModel(make_model(config), byte_tokenizer(), weights="int8")
    model = make_model(config)
    for path, weight in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "kernel" and path[-2] != "dt_proj":
            weight[...] = numpy_quantized(weight[...]).astype(np.float32)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(quantized.engine.params)}
    assert dtypes == {"float32", "int8"}
    output = (config.hidden_size, config.num_embeddings)
    kernels = [a for a in jax.tree.leaves(quantized.engine.params) if a.shape == output]
    assert [str(a.dtype) for a in kernels] == ["int8"]
    (actual,) = quantized.generate("the old dog", max_new_tokens=20)
    prompt = [TINY.bos_token_id, *byte_tokenizer().encode("the old dog")]
    tokens = jnp.asarray([prompt + actual.tokens[:-1]])
    logits = np.asarray(jax.jit(lambda tokens: model(tokens))(tokens)[0, len(prompt) - 1 :])
    assert actual.tokens == logits.argmax(-1).tolist()
    log_probs = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    expected = log_probs[np.arange(len(actual.tokens)), actual.tokens]
    np.testing.assert_allclose(actual.log_probs, expected, rtol=0, atol=1e-4)
