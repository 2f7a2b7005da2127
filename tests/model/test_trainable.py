"""Which parameters are trained, by name patterns."""

import jax
import pytest
from training.tiny import COMPUTE, MODEL

from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.errors import HymbaError
from hymba_jax.model.abstract import abstract_model
from hymba_jax.model.flops import forward_flops, training_flops
from hymba_jax.model.trainable import TRAIN_ALL, Trainable, describe_trainable, join, matches
from hymba_jax.parallel.mesh import make_mesh


def params(adapter=AdapterConfig()):  # noqa: B008, it is frozen
    return abstract_model(MODEL, COMPUTE, make_mesh(jax.devices()[:1]), adapter)[1]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("gate_proj", {"mixer.ssm.gate_proj.kernel", "mlp.gate_proj.kernel"}),
        ("ssm.gate_proj", {"mixer.ssm.gate_proj.kernel"}),
        ("mlp", {"mlp.gate_proj.kernel"}),
        ("*norm", {"mixer_norm.scale"}),
        ("norm", set()),
    ],
)
def test_patterns_are_parts_of_names(pattern, names):
    known = {"mixer.ssm.gate_proj.kernel", "mlp.gate_proj.kernel", "mixer_norm.scale"}
    assert {name for name in known if matches(name, [pattern])} == names


def refusal(trainable):
    with pytest.raises(HymbaError) as caught:
        trainable.check(params(trainable.adapter))
    return str(caught.value)


def test_a_name_that_matches_nothing_is_refused():
    adapter = AdapterConfig(kind="lora", targets=("query_proj", "q_proj"))
    message = refusal(Trainable(adapter))
    assert message.startswith("adapter.targets has 'q_proj', which matches nothing: there are ")
    assert "mixer.attention.query_proj, " in message
    message = refusal(Trainable(AdapterConfig(kind="lora", train=("bias",))))
    assert message.startswith("adapter.train has 'bias', which matches nothing")
    assert "training.freeze has 'layers'" in refusal(Trainable(freeze=("embedding", "layers")))


def test_freezing_everything_is_refused():
    assert refusal(Trainable(freeze=("*",))) == (
        "training.freeze * freezes all parameters: nothing is left to train"
    )


def test_what_is_adapted_and_what_is_not_is_said():
    adapter = AdapterConfig(kind="rslora", rank=2, targets=("query_proj", "mlp"), train=("A_log",))
    first, second = describe_trainable(Trainable(adapter), params(adapter))
    assert first == (
        "rslora of rank 2; adapted: mixer.attention.query_proj x 2, mlp.down_proj x 2, "
        "mlp.gate_proj x 2, mlp.up_proj x 2; not adapted: mixer.attention.key_proj x 2, "
        "mixer.attention.value_proj x 2, mixer.out_proj x 2, mixer.ssm.dt_proj x 2, "
        "mixer.ssm.gate_proj x 2, mixer.ssm.in_proj x 2, mixer.ssm.x_proj x 2"
    )
    # Of each layer, rank 2 times the widths of four kernels, and 32 channels of 16 states.
    trained = 2 * (2 * ((16 + 16) + 3 * (16 + 24)) + 32 * 16)
    assert second.startswith(f"trained: {trained:,} of ")
    assert second.endswith("parameters, the model's own mixer.ssm.A_log among them")
    (line,) = describe_trainable(Trainable(freeze=("embedding", "*norm")), params())
    assert line.endswith(
        "frozen: embedding, final_norm.scale, mixer.attention.key_norm.scale, "
        "mixer.attention.query_norm.scale, mixer.attention_norm.scale, mixer.ssm.B_norm.scale, "
        "mixer.ssm.C_norm.scale, mixer.ssm.dt_norm.scale, mixer.ssm_norm.scale, "
        "mixer_norm.scale, mlp_norm.scale"
    )
    assert [*describe_trainable(TRAIN_ALL, params())] == []


def test_split_and_joined_parameters_are_the_same():
    adapter = AdapterConfig(kind="lora")
    trained, frozen = Trainable(adapter).split(params(adapter))
    assert join(trained, frozen) == params(adapter)
    assert frozen == params()


def test_gradients_of_frozen_matrices_are_no_flops():
    length, forward = 32, forward_flops(MODEL, 32, predicted=32)
    assert training_flops(MODEL, length) == 3 * forward
    assert training_flops(MODEL, length, Trainable(freeze=("embedding",))) == (
        3 * forward - 2 * MODEL.num_embeddings * MODEL.hidden_size * length
    )
    adapter = AdapterConfig(kind="lora", rank=2, targets=("up_proj",))
    kernels = sum(
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(params())
        if path[-1].key in ("kernel", "embedding")
    )
    updates = 2 * 2 * (16 + 24)  # in two layers
    assert training_flops(MODEL, length, Trainable(adapter)) == (
        3 * forward + 3 * 2 * updates * length - 2 * kernels * length
    )
