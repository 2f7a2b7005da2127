"""The whole model: causality, dtypes, and layers scanned or not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from random_weights import random_weights
from slow import slow_but

from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.model import Hymba
from hymba_jax.model.hymba import layer_paths
from hymba_jax.parallel.mesh import make_mesh

CONFIG = HymbaConfig(
    vocab_size=50,
    hidden_size=32,
    mlp_size=48,
    layers="G 3*Ww G",
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=5, rope_type="default"),
    num_meta_tokens=3,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 50, (2, 24)))


@pytest.mark.parametrize("scan_layers", slow_but([True, False], True))
def test_is_causal(scan_layers):
    config = dataclasses.replace(CONFIG, layers="G 2*W")
    graph, params = random_weights(config, scan_layers=scan_layers)
    model = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens))
    before, after = model(TOKENS), model(TOKENS.at[:, 15].add(1))
    np.testing.assert_array_equal(before[:, :15], after[:, :15])
    assert np.abs(before[:, 15:] - after[:, 15:]).max() > 1e-3


def test_initialization_is_equal_scanned_or_unrolled():
    states = {
        scan_layers: dict(
            nnx.to_flat_state(
                nnx.state(
                    Hymba(CONFIG, ComputeConfig(scan_layers=scan_layers), nnx.Rngs(3)), nnx.Param
                )
            )
        )
        for scan_layers in (True, False)
    }
    scanned, unrolled = (layer_paths(CONFIG, scan_layers=choice) for choice in (True, False))
    for layer in range(CONFIG.num_layers):
        name = ("mixer", "ssm", "in_proj", "kernel")
        stack = states[True][(*scanned[layer].path, *name)]
        repeat = scanned[layer].stack_index
        alone = states[False][(*unrolled[layer].path, *name)][...]
        np.testing.assert_array_equal(stack[...] if repeat is None else stack[repeat], alone)
    kernels = [states[False][(*place.path, *name)][...] for place in unrolled]
    assert len({kernel.tobytes() for kernel in map(np.asarray, kernels)}) == CONFIG.num_layers


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_dtypes(tie_embeddings):
    config = dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings)
    model = Hymba.abstract(config, ComputeConfig(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype("float32")
    }
    states = nnx.eval_shape(lambda model: [*model.hidden_states(TOKENS)], model)
    assert {state.dtype for state in states} == {jnp.dtype("bfloat16")}
    assert nnx.eval_shape(lambda model: model(TOKENS), model).dtype == jnp.float32


def test_meta_tokens_are_seen_from_beyond_the_window():
    """A change of the first meta token reaches the last position through one window layer."""
    config = dataclasses.replace(
        CONFIG, layers="L", attention=dataclasses.replace(CONFIG.attention, value_dim=8)
    )
    model, forward = nnx.merge(*random_weights(config)), nnx.jit(Hymba.__call__)
    before = np.asarray(forward(model, TOKENS))
    model.meta_tokens[...] = model.meta_tokens[...].at[0].add(1.0)
    after = np.asarray(forward(model, TOKENS))
    assert np.abs(after - before)[:, -1].max() > 1e-4
    assert np.array_equal(forward(model, TOKENS.at[:, 0].set(4))[:, -1], after[:, -1])


@pytest.mark.parametrize(
    ("layers", "remat"),
    slow_but(
        [("2*W", "none"), ("G 2*Ww M A", "block"), ("S-", "none"), ("2*S L-M", "block")],
        ("2*W", "none"),
    ),
)
class TestDocuments:
    """Several in a row: longer than the window, shorter than the convolution, of one token."""

    lengths = (9, 1, 2, 12)

    @staticmethod
    @functools.cache
    def programs(layers, remat):
        config = dataclasses.replace(CONFIG, layers=layers, ssm=SSMConfig(head_dim=16))
        graph, params = nnx.split(Hymba(config, ComputeConfig(remat=remat), nnx.Rngs(0)))

        def loss(params, tokens, segment_ids, weights):
            logits = nnx.merge(graph, params)(tokens, segment_ids)
            return jnp.sum(jax.nn.log_softmax(logits)[..., 7] * weights), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True)), params

    def row(self):
        """Each document's tokens, and the row's ids: neighbours differ."""
        rng = np.random.default_rng(5)
        documents = [rng.integers(3, 50, length) for length in self.lengths]
        ids = np.repeat([0, 1, 0, 1], self.lengths)
        return documents, ids[None].astype(np.int32)

    def test_each_document_equals_itself_alone(self, layers, remat):
        """Logits, and what it adds to the gradient of every parameter, meta tokens included."""
        run, params = self.programs(layers, remat)
        documents, ids = self.row()
        tokens = np.concatenate(documents)[None].astype(np.int32)
        (_, logits), _ = run(params, tokens, ids, np.ones(tokens.shape, np.float32))
        start = 0
        for document in documents:
            place = slice(start, start := start + len(document))
            weights = np.zeros(tokens.shape, np.float32)
            weights[:, place] = 1.0
            _, gradients = run(params, tokens, ids, weights)
            # The same program: behind the document stands one that does not count.
            alone = np.zeros_like(tokens)
            alone[0, : len(document)] = document
            own = (np.arange(24) >= len(document)).astype(ids.dtype)[None]
            (_, expected), of_alone = run(params, alone, own, (1 - own).astype(np.float32))
            np.testing.assert_allclose(
                logits[:, place], expected[:, : len(document)], rtol=0, atol=2e-5
            )
            for path, gradient in nnx.to_flat_state(of_alone):
                actual = dict(nnx.to_flat_state(gradients))[path][...]
                scale = np.abs(gradient[...]).max()
                np.testing.assert_allclose(actual, gradient[...], rtol=0, atol=2e-5 * scale + 1e-7)

    def test_none_changes_another_to_the_last_bit(self, layers, remat):
        run, params = self.programs(layers, remat)
        documents, ids = self.row()
        tokens = np.concatenate(documents)[None].astype(np.int32)
        weights = np.zeros(tokens.shape, np.float32)
        weights[:, 10:12] = 1.0  # the third
        changed = tokens.copy()
        changed[:, :10] += 1
        changed[:, 12:] = 4
        (_, logits), gradients = run(params, tokens, ids, weights)
        (_, others), of_others = run(params, changed, ids, weights)
        np.testing.assert_array_equal(logits[:, 10:12], others[:, 10:12])
        assert np.abs(logits - others).max() > 1e-3
        for (path, actual), (_, expected) in zip(
            nnx.to_flat_state(gradients), nnx.to_flat_state(of_others), strict=True
        ):
            np.testing.assert_array_equal(actual[...], expected[...], err_msg=str(path))

    def test_each_is_the_same_with_the_sequence_sharded(self, layers, remat):
        """Over 8 devices, three positions on each: less than a window, a kernel, a document."""
        run, params = self.programs(layers, remat)
        documents, ids = self.row()
        tokens = np.concatenate(documents)[None].astype(np.int32)
        weights = np.random.default_rng(6).normal(size=tokens.shape).astype(np.float32)
        (_, expected), of_one = run(params, tokens, ids, weights)
        mesh = make_mesh(jax.devices()[:8], ParallelConfig(fsdp=1, sequence=8))
        with jax.set_mesh(mesh):
            place = NamedSharding(mesh, jax.P(None, "sequence"))
            sharded = jax.device_put((tokens, ids, weights), place)
            (_, logits), gradients = run(params, *sharded)
        assert logits.sharding.shard_shape(logits.shape) == (1, 3, 50)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
        for (path, actual), (_, wanted) in zip(
            nnx.to_flat_state(gradients), nnx.to_flat_state(of_one), strict=True
        ):
            atol = 2e-5 * np.abs(wanted[...]).max()
            np.testing.assert_allclose(
                actual[...], wanted[...], rtol=0, atol=atol, err_msg=str(path)
            )


def test_documents_whose_rotation_depends_on_their_length_are_refused():
    attention = dataclasses.replace(
        CONFIG.attention, rope_type="dynamic_ntk", rope_original_positions=20
    )
    config = dataclasses.replace(CONFIG, attention=attention, layers="A")
    model = Hymba.abstract(config, ComputeConfig())
    with pytest.raises(ValueError, match="depends on the length of each document"):
        model(TOKENS, jnp.zeros_like(TOKENS))


def test_parameters_name_every_axis():
    model = Hymba.abstract(CONFIG, ComputeConfig(scan_layers=False))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert len(leaf.get_metadata("axes")) == leaf.get_raw_value().ndim, path


def test_float32_matmuls_have_highest_precision():
    """Forward and backward: by default GPUs and TPUs multiply fewer bits."""
    config = dataclasses.replace(CONFIG, layers="2*Ww")
    graph, params = nnx.split(Hymba.abstract(config, ComputeConfig()))
    loss = jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(TOKENS)))
    lines = jax.jit(loss).lower(params).as_text().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line]
    assert len(products) > 20
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
