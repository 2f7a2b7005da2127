"""Checkpoints of a state with the same kinds of leaves as a real one, and much smaller."""

import functools
import itertools
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from slow import slow_but

from hymba_jax.checkpoint.checkpoints import (
    Checkpoints,
    LoopState,
    load_params,
    resolve_step,
    silence_orbax,
)
from hymba_jax.checkpoint.train_state import TrainState
from hymba_jax.config.training import TrainingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.run_files import checkpoint_steps
from hymba_jax.training.optimizer import make_optimizer

silence_orbax()


def make_state(step=0, width=64):
    """Other values for every step, and the optimizer's counts of it."""
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        "embedding": jax.random.normal(keys[0], (50, width)),
        "groups": {
            0: {"kernel": jax.random.normal(keys[1], (width, width), jnp.bfloat16)},
            1: {"scale": jax.random.normal(keys[2], (2, width))},
        },
    }
    moments = make_optimizer(TrainingConfig()).init(params)

    def count(path, leaf):
        return jnp.int32(step) if getattr(path[-1], "name", "") == "count" else leaf

    return TrainState(params, jax.tree.map_with_path(count, moments))


def abstract(state):
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), state
    )


def loop(step):
    return LoopState(step, {"a": "abc"})


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
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


def restore(run, like=None):
    """What a run resumes from, and what it says."""
    said = []
    with Checkpoints(run, keep=2) as checkpoints:
        state, state_of_loop = checkpoints.restore(like or abstract(make_state()), said.append)
    return state, state_of_loop, said


def test_a_state_comes_back_bit_for_bit_though_training_continues(tmp_path):
    state = make_state(7)
    kept = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, loop(7))
        for _ in range(50):
            state = overwrite(state)
    restored, restored_loop, said = restore(tmp_path)
    assert said == []
    assert_equal(restored, kept)
    assert restored_loop == loop(7)


def test_the_newest_is_restored_and_the_last_few_are_kept(run):
    with Checkpoints(run, keep=2) as checkpoints:
        checkpoints.save(make_state(3), loop(3))
    assert checkpoint_steps(run) == [2, 3]
    restored, restored_loop, _ = restore(run)
    assert restored_loop.step == 3
    assert_equal(restored, make_state(3))


def test_those_on_schedule_do_not_depend_on_others(tmp_path):
    """Checkpoint 3 is the best, 5 and 7 are of interruptions."""

    def is_even(step):
        return step % 2 == 0

    with Checkpoints(tmp_path, keep=2, keep_best=True, is_scheduled=is_even) as checkpoints:
        for step in (2, 3, 4, 5, 6, 7):
            if step == 3:
                assert checkpoints.improves(step, 1.0)
            checkpoints.save(make_state(step), loop(step))
    assert checkpoint_steps(tmp_path) == [3, 4, 6, 7]
    with Checkpoints(tmp_path, keep=2, is_scheduled=is_even) as checkpoints:
        checkpoints.save(make_state(8), loop(8))
    assert checkpoint_steps(tmp_path) == [6, 8]


def save_with_losses(run, losses):
    """Checkpoints with these validation losses, saved if one is the best so far or told to be."""
    with Checkpoints(run, keep=1, keep_best=True) as checkpoints:
        if checkpoint_steps(run):
            checkpoints.restore(abstract(make_state()), print)
        for step, loss, is_due in losses:
            if checkpoints.improves(step, loss) or is_due:
                checkpoints.save(make_state(step), loop(step))


def best_params(run, wanted):
    return load_params(run, wanted, resolve_step(run, "best"))


def test_the_best_is_kept_beside_the_newest_and_is_read_by_that_name(tmp_path):
    wanted = abstract(make_state()).params
    nan = float("nan")
    save_with_losses(tmp_path, [(1, nan, True), (2, 3.0, False), (3, 3.5, True), (4, 3.0, True)])
    assert checkpoint_steps(tmp_path) == [2, 4]
    assert_equal(best_params(tmp_path, wanted), make_state(2).params)
    save_with_losses(tmp_path, [(5, 3.1, True)])  # a resumed run knows it
    assert checkpoint_steps(tmp_path) == [2, 5]
    save_with_losses(tmp_path, [(6, 2.9, False), (7, 3.0, True), (8, 3.0, True)])
    assert checkpoint_steps(tmp_path) == [6, 8]
    assert_equal(best_params(tmp_path, wanted), make_state(6).params)
    damage_foreign(tmp_path / "checkpoints" / "8")
    save_with_losses(tmp_path, [(7, 2.95, True), (8, 3.0, True)])
    assert checkpoint_steps(tmp_path) == [6, 8]
    assert_equal(best_params(tmp_path, wanted), make_state(6).params)
    shutil.rmtree(tmp_path / "checkpoints" / "6")  # the next one counts as the best
    save_with_losses(tmp_path, [(9, 3.3, False), (10, 3.4, True)])
    assert checkpoint_steps(tmp_path) == [9, 10]


def test_a_run_without_a_best_checkpoint_says_so(run):
    with pytest.raises(HymbaError, match=r"2: knows no best checkpoint, .*: name a step"):
        load_params(run, abstract(make_state()).params, resolve_step(run, "best"))


def test_parameters_are_read_without_the_optimizer(run):
    wanted = abstract(make_state()).params
    assert_equal(load_params(run, wanted), make_state(2).params)
    assert_equal(load_params(run, wanted, step=1), make_state(1).params)


def test_parameters_are_placed_as_asked(run):
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
        load_params(directory, abstract(make_state()).params, step)


def test_what_a_killed_save_left_is_ignored_and_removed(run):
    left = run / "checkpoints" / "3.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "params").mkdir()
    assert checkpoint_steps(run) == [1, 2]
    assert restore(run)[1].step == 2
    assert not left.exists()


def test_what_a_killed_removal_left_does_no_harm(run):
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "loop/metadata"):
        (run / "checkpoints" / "1" / name).unlink(missing_ok=True)
    with Checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), print)[1].step == 2
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


def damage_metadata(step):
    file = step / "params" / "_METADATA"
    file.write_text(file.read_text().replace('"checksums"', '"other"'))


def assert_set_aside(run, said, reason=""):
    """Checkpoint 2, for 1."""
    (line,) = said
    assert line.startswith(f"{run}/checkpoints/2")
    assert reason in line
    assert line.endswith(": set aside as 2.damaged-1, step 1 is used")
    assert "\n" not in line
    assert len(line) < 500
    assert checkpoint_steps(run) == [1]
    assert (run / "checkpoints" / "2.damaged-1").is_dir()


DAMAGES = [damage_truncate, damage_lose_arrays, damage_lose_a_part, damage_foreign, damage_metadata]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(run, damage):
    damage(run / "checkpoints" / "2")
    state, loop_state, said = restore(run)
    assert_equal(state, make_state(1))
    assert loop_state == loop(1)
    assert_set_aside(run, said)
    with Checkpoints(run, keep=2) as checkpoints:
        checkpoints.save(make_state(2), loop(2))
    assert_equal(restore(run)[0], make_state(2))


def flip(file, seed):
    content = bytearray(file.read_bytes())
    place, bit = divmod(np.random.default_rng(seed).integers(8 * len(content)), 8)
    content[place] ^= 1 << bit
    file.write_bytes(content)


HARMS = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": lambda file: file.unlink(),
    **{f"bit {seed}": functools.partial(flip, seed=seed) for seed in range(3)},
}


@pytest.mark.parametrize("harm", slow_but(HARMS, "bit 0"))
def test_a_damaged_file_is_found_or_does_no_harm(run, tmp_path, harm):
    """Whatever the file: values are those that were saved, of one step or the other."""
    used = []
    files = sorted(file for file in (run / "checkpoints" / "2").rglob("*") if file.is_file())
    for i, file in enumerate(files):
        copy = tmp_path / "copies" / str(i)
        shutil.copytree(run / "checkpoints", copy / "checkpoints")
        HARMS[harm](copy / file.relative_to(run))
        state, loop_state, said = restore(copy)
        used.append(loop_state.step)
        assert_equal(state, make_state(loop_state.step))
        assert loop_state == loop(loop_state.step)
        if loop_state.step == 1:
            assert_set_aside(copy, said)
    assert used.count(1) >= 8


def test_if_no_checkpoint_is_intact_all_are_left_as_they_are(run):
    for step in (1, 2):
        damage_foreign(run / "checkpoints" / str(step))
    with pytest.raises(HymbaError) as caught:
        restore(run)
    assert str(caught.value) == (
        f"{run}/checkpoints: no checkpoint is intact ({run}/checkpoints/2/loop/metadata: damaged, "
        f"or another program wrote it; {run}/checkpoints/1/loop/metadata: damaged, or another "
        "program wrote it): restore one from a copy, or choose another output"
    )
    assert checkpoint_steps(run) == [1, 2]


def test_another_model_or_optimizer_is_refused_and_no_damage(run):
    other = make_state()._replace(optimizer=optax.sgd(0.1, 0.9).init(make_state().params))
    for like, part in ((abstract(make_state(width=32)), "params"), (abstract(other), "optimizer")):
        with pytest.raises(HymbaError, match=f"2/{part}: holds arrays of other names, shapes"):
            restore(run, like)
    with pytest.raises(HymbaError, match="shape"):
        load_params(run, abstract(make_state(width=32)).params)
    assert checkpoint_steps(run) == [1, 2]


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("is_damage", [True, False])
def test_what_another_process_found_counts_for_all(run, monkeypatch, call, is_damage):
    """When it read the newest checkpoint, or when it compared checksums."""
    calls = itertools.count()

    def gather(own):
        return [own, ["checkpoints/2: gone", is_damage] if next(calls) == call else None]

    monkeypatch.setattr("hymba_jax.checkpoint.checkpoints.gather", gather)
    if is_damage:
        state, _, said = restore(run)
        assert_equal(state, make_state(1))
        assert said == ["checkpoints/2: gone: set aside as 2.damaged-1, step 1 is used"]
    else:
        with pytest.raises(HymbaError, match="checkpoints/2: gone"):
            restore(run)
        assert checkpoint_steps(run) == [1, 2]


@pytest.mark.parametrize("error", [MemoryError("no room"), PermissionError(13, "not yours")])
def test_an_error_of_this_machine_is_no_damage(run, monkeypatch, error):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
    with pytest.raises(HymbaError, match=r"checkpoints/2/params: .*no"):
        restore(run)
    assert checkpoint_steps(run) == [1, 2]


def test_a_save_that_fails_in_the_background_is_found(run, monkeypatch):
    async def no_space(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.path.atomicity.AtomicRenameTemporaryPath, "finalize", no_space)
    with pytest.raises(HymbaError, match=r"cannot be written.*No space left"):
        save_until_found(run)
    monkeypatch.undo()
    assert_equal(restore(run)[0], make_state(2))  # what was there before is intact


def save_until_found(directory):
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(make_state(3), loop(3))
        for _ in range(100):
            time.sleep(0.05)
            checkpoints.check()


def test_a_place_that_is_no_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HymbaError, match="file/run/checkpoints"):
        Checkpoints(tmp_path / "file" / "run", keep=1)


def test_optimizer_states_keep_their_types(run):
    restored, _, _ = restore(run)
    assert isinstance(optax.tree.get(restored.optimizer, "mu"), dict)
    assert int(optax.tree.get_all_with_path(restored.optimizer, "count")[0][1]) == 2


def rewrite_params(run, change):
    """Writes the arrays of checkpoint 2 again, changed, with the checksums that they had."""
    path = run / "checkpoints" / "2" / "params"
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        metadata = ocp.StandardCheckpointHandler().metadata(path)
        params = make_state(2).params
        args = ocp.args.StandardSave(change(params), custom_metadata=metadata.custom_metadata)
        checkpointer.save(path, args=args, force=True)


def flip_a_bit(params):
    bits = np.array(params["groups"][0]["kernel"]).view(np.uint16)
    bits[3, 5] ^= 1
    return params | {"groups": params["groups"] | {0: {"kernel": bits.view(jnp.bfloat16)}}}


def test_a_flipped_bit_is_found_by_name(run):
    rewrite_params(run, lambda params: params)
    assert_equal(load_params(run, abstract(make_state()).params), make_state(2).params)
    rewrite_params(run, flip_a_bit)
    where = r"checkpoints/2/params: damaged.*\(groups\.0\.kernel\)"
    with pytest.raises(HymbaError, match=where):
        load_params(run, abstract(make_state()).params)
    assert_set_aside(run, restore(run)[2], "(groups.0.kernel)")


def test_damage_is_found_when_parameters_are_cast(run):
    wanted = jax.tree.map(lambda like: like.update(dtype=jnp.bfloat16), abstract(make_state()))
    expected = jax.tree.map(lambda array: array.astype(jnp.bfloat16), make_state(2).params)
    assert_equal(load_params(run, wanted.params), expected)
    rewrite_params(run, flip_a_bit)
    with pytest.raises(HymbaError, match="damaged"):
        load_params(run, wanted.params)


def test_a_checkpoint_without_checksums_is_refused(run):
    file = run / "checkpoints" / "2" / "params" / "_METADATA"
    file.write_text(file.read_text().replace('"checksums"', '"other"'))
    with pytest.raises(HymbaError, match="2/params: has no checksums"):
        load_params(run, abstract(make_state()).params)


@pytest.mark.parametrize(
    ("old", "new"), [('"step": 2', '"step": 60'), ('"a": "abc"', '"a": "abd"')]
)
def test_an_edited_loop_state_is_damaged(run, old, new):
    file = run / "checkpoints" / "2" / "loop" / "metadata"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert_set_aside(run, restore(run)[2], f"{file}: damaged, its checksum does not match")


def test_a_checkpoint_under_another_step_is_damaged(run):
    (run / "checkpoints" / "2").rename(run / "checkpoints" / "60")
    _, loop_state, (line,) = restore(run)
    assert loop_state.step == 1
    assert (
        "60: damaged, its parts belong to different steps (loop/metadata of 2, optimizer of 2)"
        in line
    )


def test_an_optimizer_of_another_step_is_damaged(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(5), loop(6))
    with pytest.raises(HymbaError, match=r"\(loop/metadata of 6, optimizer of 5\)"):
        restore(tmp_path)


def test_an_optimizer_is_behind_by_the_steps_skipped(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(5), loop(8)._replace(skipped=3))
    assert restore(tmp_path)[1] == loop(8)._replace(skipped=3)


def test_only_directories_named_as_steps_are_checkpoints(run):
    for name in ("\u0661\u0662", "007", "-3", "8.5", " 9"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "5").write_text("")
    assert checkpoint_steps(run) == [1, 2]
    assert restore(run)[1].step == 2
