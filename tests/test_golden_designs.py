"""Other designs of the paper's comparison against transformers: Mamba2 and Llama.

Bounds are those of golden/README.md; transformers' own float32 and float64 runs are 4e-6 apart.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden_cases import GOLDEN
from slow import slow_but

from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.data import IGNORED_TARGET, Batch
from hymba_jax.model import Hymba
from hymba_jax.model.hymba import layer_paths
from hymba_jax.training.loss import next_token_loss

VALUE_BOUND = 5e-5
GRADIENT_BOUND = 1e-4  # of the gradient's own maximum
CASES = slow_but(["mamba2-one-group", "mamba2-two-groups", "llama"], "mamba2-two-groups", "llama")


def mamba2_config(hf):
    return HymbaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        layers=f"{hf['num_hidden_layers']}*S-",
        ssm=SSMConfig(
            expand=hf["expand"],
            state_size=hf["state_size"],
            conv_kernel=hf["conv_kernel"],
            head_dim=hf["head_dim"],
            groups=hf["n_groups"],
        ),
        num_meta_tokens=0,
        norm_eps=hf["layer_norm_epsilon"],
    )


def llama_config(hf):
    return HymbaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        mlp_size=hf["intermediate_size"],
        layers=f"{hf['num_hidden_layers']}*A",
        attention=AttentionConfig(
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf["num_key_value_heads"],
            head_dim=hf["head_dim"],
            value_dim=hf["head_dim"],
            rope_type="default",
            rope_theta=hf["rope_theta"],
        ),
        num_meta_tokens=0,
        max_positions=hf["max_position_embeddings"],
        norm_eps=hf["rms_norm_eps"],
    )


def mamba2_layer(of, config):
    """A layer's tensors under native names; `of` gives them by their names there."""
    E, GN = config.channels, config.ssm.groups * config.ssm.state_size
    z, x, B_C, dt = np.split(of("mixer.in_proj.weight").T, np.cumsum([E, E, 2 * GN]), axis=1)
    taps, bias = of("mixer.conv1d.weight")[:, 0].T, of("mixer.conv1d.bias")
    return {
        "mixer_norm.scale": of("norm.weight"),
        "mixer.ssm.gate_proj.kernel": z,
        "mixer.ssm.in_proj.kernel": x,
        "mixer.ssm.B_C_proj.kernel": B_C,
        "mixer.ssm.dt_proj.kernel": dt,
        "mixer.ssm.conv.conv_kernel": taps[:, :E],
        "mixer.ssm.B_C_conv.conv_kernel": taps[:, E:],
        "mixer.ssm.conv.conv_bias": bias[:E],
        "mixer.ssm.B_C_conv.conv_bias": bias[E:],
        "mixer.ssm.A_log": of("mixer.A_log"),
        "mixer.ssm.D": of("mixer.D"),
        "mixer.ssm.dt_bias": of("mixer.dt_bias"),
        "mixer.ssm.norm.scale": of("mixer.norm.weight").reshape(config.ssm.groups, -1),
        "mixer.out_proj.kernel": of("mixer.out_proj.weight").T,
    }


def llama_layer(of, config):
    return {
        "mixer_norm.scale": of("input_layernorm.weight"),
        "mlp_norm.scale": of("post_attention_layernorm.weight"),
        "mixer.out_proj.kernel": of("self_attn.o_proj.weight").T,
        **{
            f"mixer.attention.{ours}_proj.kernel": of(f"self_attn.{theirs}_proj.weight").T
            for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"))
        },
        **{
            f"mlp.{name}_proj.kernel": of(f"mlp.{name}_proj.weight").T
            for name in ("gate", "up", "down")
        },
    }


FORMS = {
    "mamba2": (mamba2_config, mamba2_layer, "backbone", "embeddings", "norm_f"),
    "llama": (llama_config, llama_layer, "model", "embed_tokens", "norm"),
}


def to_native(tensors, config, form):
    """The tensors of a checkpoint, or their gradients, by the paths of native parameters."""
    _, layer, root, embedding, final_norm = form
    native = {
        ("embedding",): tensors[f"{root}.{embedding}.weight"],
        ("final_norm", "scale"): tensors[f"{root}.{final_norm}.weight"],
    }
    for i, place in enumerate(layer_paths(config, scan_layers=False)):
        named = layer(lambda name, i=i: tensors[f"{root}.layers.{i}.{name}"], config)
        native |= {(*place.path, *name.split(".")): array for name, array in named.items()}
    return native


@functools.cache
def run(case):
    """Logits, loss and gradients, and those that are expected."""
    folder, form = GOLDEN / case, FORMS[case.split("-")[0]]
    config = form[0](json.loads((folder / "config.json").read_text()))
    arrays = dict(np.load(folder / "golden.npz"))
    weights, gradients = (
        to_native(safetensors.numpy.load_file(folder / f"{name}.safetensors"), config, form)
        for name in ("model", "grads")
    )
    graph, abstract = nnx.split(Hymba.abstract(config, ComputeConfig(scan_layers=False)))
    params = nnx.from_flat_state(
        [
            (path, leaf.replace(jnp.asarray(weights[path])))
            for path, leaf in nnx.to_flat_state(abstract)
        ]
    )

    def loss_and_logits(params, tokens):
        model = nnx.merge(graph, params)
        targets = jnp.full_like(tokens, IGNORED_TARGET).at[:, :-1].set(tokens[:, 1:])
        return next_token_loss(model, Batch(tokens, targets))["loss"].mean, model(tokens)

    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    step = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))
    (loss, logits), actual = step(params, tokens)
    actual = {path: leaf[...] for path, leaf in nnx.to_flat_state(actual)}
    return (logits, loss, actual), (arrays["logits"], arrays["loss"], gradients)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss(case):
    (logits, loss, _), (expected_logits, expected_loss, _) = run(case)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=VALUE_BOUND)
    np.testing.assert_allclose(loss, expected_loss, rtol=0, atol=VALUE_BOUND)


@pytest.mark.parametrize("case", CASES)
def test_gradient_of_every_parameter(case):
    (_, _, gradients), (_, _, expected) = run(case)
    assert gradients.keys() == expected.keys()
    for path, wanted in expected.items():
        error = np.abs(gradients[path] - wanted).max() / np.abs(wanted).max()
        assert error <= GRADIENT_BOUND, (path, error)
