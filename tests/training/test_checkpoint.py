"""Checkpoints of a state with the same kinds of leaves as a real one, and much smaller."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from hymba_jax.errors import HymbaError
from hymba_jax.training.checkpoint import (
    Checkpoints,
    LoopState,
    load_params,
    silence_orbax,
)
from hymba_jax.training.checkpoint_folder import checkpoint_steps
from hymba_jax.training.config import TrainingConfig
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.state import TrainState

silence_orbax()
# Pytest makes errors of the warning that this ignores.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


def make_state(seed=0, width=64):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embedding": jax.random.normal(keys[0], (50, width)),
        "segments": {
            0: {"kernel": jax.random.normal(keys[1], (width, width), jnp.bfloat16)},
            1: {"scale": jax.random.normal(keys[2], (2, width))},
        },
    }
    return TrainState(params, make_optimizer(TrainingConfig()).init(params))


def template(state):
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), state
    )


def loop(step):
    return LoopState(step, {"next_index": step, "epochs": [1, 2]}, "abc")


def assert_equal(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for array, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array, other)


@jax.jit(donate_argnums=0)
def overwrite(state):
    """An update in place, as the training step does."""
    return jax.tree.map(lambda array: array + 1, state)


@pytest.fixture
def run(tmp_path):
    """A run directory with checkpoints 1 and 2."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step), loop(step))
    return tmp_path


def test_a_state_comes_back_bit_for_bit_though_training_goes_on(tmp_path):
    state = make_state()
    kept = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, loop(7))
        for _ in range(50):
            state = overwrite(state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored, restored_loop = checkpoints.restore(template(make_state()))
    assert_equal(restored, kept)
    assert restored_loop == loop(7)


def test_the_newest_is_restored_and_the_last_few_are_kept(run):
    with Checkpoints(run, keep=2) as checkpoints:
        checkpoints.save(make_state(3), loop(3))
    assert checkpoint_steps(run) == [2, 3]
    with Checkpoints(run, keep=2) as checkpoints:
        restored, restored_loop = checkpoints.restore(template(make_state()))
    assert restored_loop.step == 3
    assert_equal(restored, make_state(3))


def test_parameters_are_read_without_the_optimizer(run):
    wanted = template(make_state()).params
    assert_equal(load_params(run, wanted), make_state(2).params)
    assert_equal(load_params(run, wanted, step=1), make_state(1).params)


def test_parameters_go_where_the_template_says(run):
    mesh = jax.make_mesh((8,), ("data",), devices=jax.devices())
    place = jax.NamedSharding(mesh, jax.P(None, "data"))
    wanted = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place),
        make_state().params,
    )
    params = load_params(run, wanted)
    assert params["embedding"].sharding == place
    assert_equal(params, make_state(2).params)


@pytest.mark.parametrize("step", [None, 5])
def test_a_checkpoint_that_is_not_there_is_said_to_be_missing(tmp_path, run, step):
    directory = tmp_path / "empty" if step is None else run
    with pytest.raises(HymbaError, match="no checkpoint"):
        load_params(directory, template(make_state()).params, step)


def test_what_a_killed_save_left_is_ignored_and_removed(run):
    left = run / "checkpoints" / "3.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "params").mkdir()
    assert checkpoint_steps(run) == [1, 2]
    with Checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.restore(template(make_state()))[1].step == 2
    assert not left.exists()


def test_what_a_killed_removal_left_does_no_harm(run):
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "loop/metadata"):
        (run / "checkpoints" / "1" / name).unlink(missing_ok=True)
    with Checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.restore(template(make_state()))[1].step == 2
        checkpoints.save(make_state(3), loop(3))
    assert checkpoint_steps(run) == [2, 3]


def damage_truncate(step):
    for file in step.rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:50])


def damage_lose_arrays(step):
    for file in (step / "params").rglob("d/*"):
        file.unlink()


def damage_lose_a_part(step):
    for file in (step / "loop").iterdir():
        file.unlink()
    (step / "loop").rmdir()


def damage_foreign(step):
    (step / "loop" / "metadata").write_text('{"epoch": 3}')


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_lose_arrays, damage_lose_a_part, damage_foreign]
)
def test_damage_is_one_clear_line(run, damage, caplog):
    damage(run / "checkpoints" / "2")
    with Checkpoints(run, keep=2) as checkpoints, pytest.raises(HymbaError) as caught:
        checkpoints.restore(template(make_state()))
    message = str(caught.value)
    assert message.startswith(f"{run}/checkpoints/2: ")
    assert "\n" not in message
    assert len(message) < 500
    assert checkpoint_steps(run) == [1, 2]


def test_another_shape_is_refused_and_neither_cut_nor_padded(run):
    other = template(make_state(width=32))
    with Checkpoints(run, keep=2) as checkpoints, pytest.raises(HymbaError, match="shape"):
        checkpoints.restore(other)
    with pytest.raises(HymbaError, match="shape"):
        load_params(run, other.params)


def test_a_save_that_fails_in_the_background_is_found(tmp_path, monkeypatch):
    async def no_space(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.path.atomicity.AtomicRenameTemporaryPath, "finalize", no_space)
    with pytest.raises(HymbaError, match=r"cannot be written.*No space left"):
        save_until_found(tmp_path)


def save_until_found(directory):
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(make_state(), loop(1))
        for _ in range(100):
            time.sleep(0.05)
            checkpoints.check()


def test_a_place_that_is_no_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HymbaError, match="file/run/checkpoints"):
        Checkpoints(tmp_path / "file" / "run", keep=1)


def test_optimizer_states_keep_their_types(run):
    with Checkpoints(run, keep=2) as checkpoints:
        restored, _ = checkpoints.restore(template(make_state()))
    assert isinstance(optax.tree.get(restored.optimizer, "mu"), dict)
    assert int(optax.tree.get_all_with_path(restored.optimizer, "count")[0][1]) == 0
