"""Training on 8 devices equals training on one, however they share the work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from sharded_step import CASES, EVEN, LENGTHS, ODD, SNAPSHOTS, STACKED, ShardedStep
from slow import slow_but

from hymba_jax.config import PRESETS
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.model.sharding import describe_sharding, state_shardings
from hymba_jax.parallel.mesh import constrain, gather_param, make_mesh, partition
from hymba_jax.training.optimizer import muon


@pytest.fixture(scope="module")
def on_one():
    """Of each model, the state before the first step, and what training gives on one device."""

    @functools.cache
    def run(config):
        step = ShardedStep(config, jax.devices()[:1])
        start = jax.device_get(step.initialize())
        return start, step.run(start)

    return run


# All axes but data, along which `tests/training/test_adapters.py` shards a step, and the options of
# how it computes. The others take up to two minutes of processor time each.
QUICK = "2x2x2-odd-sequence"


@pytest.fixture(scope="module", params=slow_but(CASES, QUICK))
def step(request):
    config, parallel = CASES[request.param]
    step = ShardedStep(config, jax.devices()[:8], parallel)
    step.snapshot = SNAPSHOTS / f"{request.param}.txt"
    return step


@pytest.fixture(scope="module")
def results(step, on_one):
    start, expected = on_one(step.config)
    return step.run(start), expected


def test_losses_agree(results):
    actual, expected = results
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)


def test_gradients_agree(step, results):
    """Of the first step, a tenth of which the optimizer then has as its mean. What sums round off
    grows with the root of the positions they are over: of 104 tokens, that of a key projection
    differs by 1.1e-5 between two implementations of attention on one device."""
    tolerance = 1e-5 * np.sqrt(step.length / LENGTHS[EVEN])
    actual, expected = (jax.tree.leaves_with_path(means) for _, means, _ in results)
    for (path, gradient), (_, wanted) in zip(actual, expected, strict=True):
        largest = np.abs(wanted).max()
        assert largest > 0, path
        atol = tolerance * largest
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=atol, err_msg=str(path))


def test_parameters_agree(results):
    """Adam divides by the gradient's size, so rounding of a tiny gradient can move a parameter by
    a part of the learning rate of 3e-3; a wrong gradient moves most of them by all of it."""
    actual, expected = (jax.tree.leaves(params) for _, _, params in results)
    for parameter, wanted in zip(actual, expected, strict=True):
        difference = np.abs(np.asarray(parameter) - np.asarray(wanted))
        assert difference.mean() < 1e-5
        assert difference.max() < 3e-3


def test_each_device_initializes_its_own_shard(on_one):
    config, parallel = CASES[QUICK]
    step = ShardedStep(config, jax.devices()[:8], parallel)
    initial = step.initialize()
    expected, _ = on_one(config)
    for array, whole in zip(*map(jax.tree.leaves, (initial, expected)), strict=True):
        np.testing.assert_allclose(array, whole, rtol=1e-6)
    assert jax.tree.map(lambda array: array.sharding, initial) == step.abstract.shardings
    kernel = initial.params["groups"][1]["group"]["blocks"][0]["mlp"]["up_proj"]["kernel"]
    parts = {shard.data.shape for shard in kernel.addressable_shards}
    assert parts == {(STACKED, config.hidden_size // 2, config.mlp_size // 2)}


def gathered(step):
    """The numbers, not tokens, that are put together from parts on several devices."""
    collectives = [c for c in step.collectives() if c.kind == "all-gather"]
    return [c for c in collectives if c.dtype == "f32"]


def test_no_activations_are_gathered(step):
    """But of heads, which `tensor` may not divide."""
    lengths = {step.length, step.length // step.mesh.shape["sequence"]}
    for collective in gathered(step):
        assert collective.over == "tensor" or not lengths & {*collective.shape}, collective


@pytest.mark.parametrize("vocab", [64, 61])
def test_no_activations_are_replicated_to_sum_the_gradients_of_a_table(vocab, capfd):
    """XLA says so where it considers that, on meshes of fsdp and tensor alone."""
    mesh = make_mesh(jax.devices()[:8], ParallelConfig(fsdp=4, tensor=2))
    sizes = {"vocab": vocab, "hidden": 32}
    rows = NamedSharding(mesh, partition(("batch", None), {"batch": 8}, mesh))
    table = NamedSharding(mesh, partition(("vocab", "hidden"), sizes, mesh))

    def loss(embedding, tokens):
        x = gather_param(nnx.Param(embedding, axes=("vocab", "hidden")))[tokens]
        return jnp.sum(constrain(x, "batch", None, None) ** 2)

    with jax.set_mesh(mesh):
        tokens = jax.ShapeDtypeStruct((8, 26), jnp.int32, sharding=rows)
        embedding = jax.ShapeDtypeStruct((vocab, 32), jnp.float32, sharding=table)
        jax.jit(jax.grad(loss), out_shardings=table).lower(embedding, tokens).compile()
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("layers", [3, 12])
def test_muon_collects_each_matrix_on_one_device_and_replicates_no_stack(layers, capfd):
    mesh = make_mesh(jax.devices()[:8], ParallelConfig(data=4, fsdp=2))
    whole = jax.random.normal(jax.random.key(0), (layers, 48, 32))
    sharding = NamedSharding(mesh, jax.P(None, "fsdp"))
    optimizer = muon(TrainingConfig(optimizer="muon"))

    def direction(gradient):
        params = {"layers": {"kernel": gradient}}
        return optimizer.update(params, optimizer.init(params))[0]["layers"]["kernel"]

    expected = jax.jit(direction)(whole)
    with jax.set_mesh(mesh):
        sharded = jax.jit(direction, out_shardings=sharding)
        compiled = sharded.lower(jax.device_put(whole, sharding)).compile()
    assert "rematerialization" not in capfd.readouterr().err
    np.testing.assert_allclose(
        compiled(jax.device_put(whole, sharding)), expected, atol=1e-5 * np.abs(expected).max()
    )
    assert f"f32[{layers},48,32]" not in compiled.as_text()


def test_no_stack_of_layers_is_gathered_at_once(step):
    assert not [c for c in gathered(step) if STACKED in c.shape]


def test_program_matches_its_snapshot(step):
    """If it is another and better one: python tests/sharded_step.py"""
    assert step.describe() == step.snapshot.read_text()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ParallelConfig(), (1, 8, 1, 1)),
        (ParallelConfig(tensor=2), (1, 4, 1, 2)),
        (ParallelConfig(data=-1, fsdp=2), (4, 2, 1, 1)),
        (ParallelConfig(data=2, fsdp=2, tensor=2), (2, 2, 1, 2)),
        (ParallelConfig(sequence=4), (1, 2, 4, 1)),
    ],
)
def test_meshes(config, expected):
    mesh = make_mesh(jax.devices()[:8], config)
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor")
    assert mesh.axis_sizes == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 0},
            "parallel config: data is 0, not at least 1, nor -1 for all remaining devices",
        ),
        ({"tensor": -2, "data": 0}, "data is 0, .*; tensor is -2, not"),
        ({"data": -1}, "parallel config: data and fsdp are -1, only one may be"),
        ({"fsdp": 3}, "data 1 x fsdp 3 x sequence 1 x tensor 1 is not the number of devices, 8"),
        ({"tensor": 3}, "data 1 x sequence 1 x tensor 3 times an integer is not the number"),
    ],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(HymbaError, match=message):
        make_mesh(jax.devices()[:8], ParallelConfig(**sizes))


def test_indivisible_axes_are_replicated():
    mesh = make_mesh(jax.devices()[:8], ParallelConfig(fsdp=4, tensor=2))
    params = {
        "odd": nnx.Param(np.zeros((61, 40)), axes=("vocab", "hidden")),
        "heads": nnx.Param(np.zeros((40, 20)), axes=("hidden", "heads")),
        "stacked": nnx.Param(np.zeros((3, 40, 48)), axes=("hidden", "mlp")),
        "count": np.zeros(3),
    }
    specs = {name: s.spec for name, s in state_shardings(params, ODD, mesh).items()}
    assert specs == {
        "odd": jax.P(None, "fsdp"),
        "heads": jax.P("fsdp", None),
        "stacked": jax.P(None, "fsdp", "tensor"),
        "count": jax.P(),
    }


def test_the_sharding_in_words():
    mesh = make_mesh(jax.devices()[:8], ParallelConfig(data=2, tensor=2))
    assert describe_sharding(PRESETS["hymba-1.5b"], mesh, 2048) == (
        "8 devices, data 2 x fsdp 2 x sequence 1 x tensor 2; sharded: batch over 4, hidden over 2, "
        "mlp over 2, channels over 2; replicated, as not divisible: vocab 32001 by 2, "
        "5 key/value heads by 2"
    )
    assert describe_sharding(PRESETS["hymba-125m"], make_mesh(jax.devices()[:8]), 2048) == (
        "8 devices, data 1 x fsdp 8 x sequence 1 x tensor 1; sharded: batch over 8, hidden over 8"
    )


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (8192, "batch over 1, length over 8"),
        (8191, "batch over 1; replicated, as not divisible: length 8191 by 8"),
    ],
)
def test_the_sharding_of_a_length_in_words(length, expected):
    mesh = make_mesh(jax.devices()[:8], ParallelConfig(fsdp=1, sequence=8))
    described = describe_sharding(PRESETS["hymba-125m"], mesh, length)
    assert described.split("; sharded: ")[1] == expected


@pytest.mark.slow
def test_an_indivisible_length_is_replicated(on_one):
    step = ShardedStep(EVEN, jax.devices()[:8], ParallelConfig(fsdp=1, sequence=8))
    start, (losses, means, _) = on_one(EVEN)
    actual = step.run(start)
    np.testing.assert_allclose(actual[0], losses, rtol=1e-5)
    for gradient, wanted in zip(*map(jax.tree.leaves, (actual[1], means)), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert list(step.collectives()) == []


def test_constrain_shards_activations():
    x = jnp.ones((8, 3, 6))
    assert constrain(x, "batch", None, "mlp") is x
    with jax.set_mesh(make_mesh(jax.devices()[:8], ParallelConfig(fsdp=4, tensor=2))):
        split = jax.jit(lambda x: constrain(x, "batch", None, "mlp"))(x)
        odd = jax.jit(lambda x: constrain(x[:7], "batch", None, "mlp"))(x)
    assert split.sharding.shard_shape(split.shape) == (2, 3, 3)
    assert odd.sharding.shard_shape(odd.shape) == (7, 3, 3)
