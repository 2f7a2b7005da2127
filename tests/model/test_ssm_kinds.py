"""SSM heads of another kind, with a state and projections that no other file knows."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inference.models import make_model

from hymba_jax import cli
from hymba_jax.config import layer_pattern
from hymba_jax.config.layer_pattern import LayerSpec
from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.inference.batch_state import Request
from hymba_jax.inference.engine import Engine
from hymba_jax.model import fuse_projections
from hymba_jax.model.layers import Linear
from hymba_jax.model.mixer import SSM_KINDS
from hymba_jax.model.state import broadcast_to_batch
from hymba_jax.types import Array, Float


class AverageState(NamedTuple):
    average: Float[Array, "batch channels"]


class AverageSSM(nnx.Module):
    """h_t = decay * h_{t-1} + (1 - decay) * in_t, where the input decides the decay."""

    INPUT_PROJECTIONS: ClassVar = ("input_proj", "decay_proj")

    def __init__(self, config, compute, rngs):
        self.channels = config.channels
        axes = ("hidden", "channels")
        self.input_proj = Linear(config.hidden_size, config.channels, axes, compute, rngs)
        self.decay_proj = Linear(config.hidden_size, config.channels, axes, compute, rngs)

    def __call__(self, x, context, state=None):
        batch, length, _ = x.shape
        inputs, decay = self.input_proj(x), jax.nn.sigmoid(self.decay_proj(x))
        lengths = jnp.full(batch, length) if context.lengths is None else context.lengths
        valid = (jnp.arange(length)[:, None] < lengths[None])[..., None]
        state = state or self.init_state(batch, x.dtype, x.dtype)

        def step(h, position):
            value, decay, valid = position
            h = jnp.where(valid, decay * h + (1 - decay) * value, h)
            return h, h

        h, outputs = jax.lax.scan(
            step,
            broadcast_to_batch(state, batch).average,
            (inputs.swapaxes(0, 1), decay.swapaxes(0, 1), valid),
        )
        return outputs.swapaxes(0, 1), AverageState(h)

    def init_state(self, batch, dtype, state_dtype):
        return AverageState(jnp.zeros((batch, self.channels), state_dtype))

    def flops(self, length):
        return 3.0 * length * self.channels


@pytest.fixture
def model(monkeypatch):
    """Hybrid layers and one that has these heads alone."""
    monkeypatch.setitem(SSM_KINDS, "average", AverageSSM)
    for letter, spec in {
        "T": LayerSpec("window", ssm="average"),
        "t": LayerSpec("window", ssm="average", reuses_kv=True),
        "U": LayerSpec(None, ssm="average"),
    }.items():
        monkeypatch.setitem(layer_pattern._LETTERS, letter, spec)
        monkeypatch.setitem(layer_pattern._SPECS, spec, letter)
    return make_model(layers="Tt U")


def test_prefill_and_decode_equal_the_full_forward_pass(model):
    """Two chunks of a prompt longer than the window, and greedy tokens; projections are fused."""
    prompt, steps = np.random.default_rng(0).integers(3, 200, 13).tolist(), 6
    engine = Engine(model, max_chunk=8)
    request = Request(prompt, SamplingConfig(), sample=0, max_new_tokens=steps)
    state, first = engine.insert(engine.prefill([prompt], 64), [request])
    _, rest = engine.decode(state)
    completion = [int(first.tokens[0, 0]), *np.asarray(rest.tokens)[0, : steps - 1].tolist()]
    logits = jax.jit(lambda model, tokens: model(tokens))(
        model, jnp.asarray([prompt + completion], jnp.int32)
    )
    assert completion == np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1).tolist()
    log_probs = np.take(jax.nn.log_softmax(logits[0]), completion, axis=-1)
    expected = [log_probs[len(prompt) - 1 + i, i] for i in range(steps)]
    actual = [first.log_probs[0, 0], *rest.log_probs[0, : steps - 1]]
    np.testing.assert_allclose(actual, expected, atol=1e-4)  # float32, matmuls of another order


def test_its_projections_are_fused_with_those_of_attention(model):
    mixer = fuse_projections(model).blocks()[0].mixer
    fused = mixer.attention.query_proj.fused
    assert mixer.ssm.input_proj.fused is mixer.ssm.decay_proj.fused is fused


def test_its_state_is_in_the_report_of_memory(model, tmp_path, capsys):
    path = tmp_path / "model.toml"
    path.write_text('[model]\npreset = "hymba-125m"\nlayers = "Tt 2*U"\nmax_positions = 64\n')
    cli.main(["memory", "--config", str(path), "--context", "64", "--state-dtype", "float32"])
    row = next(line for line in capsys.readouterr().out.splitlines() if "average" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:2] == ["average, float32", "0.0000164"]  # 4 * 1024 * 4
