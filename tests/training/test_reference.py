"""What is kept of a reference, and when it is computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.test_conversation_rows import make_conversations, make_store

from hymba_jax.config import ComputeConfig
from hymba_jax.config.data import DataConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import Stage
from hymba_jax.data.preference_rows import PreferenceRows
from hymba_jax.errors import HymbaError
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.training.reference import Reference

START = 3


@pytest.fixture
def reference(tmp_path):
    """Of 20 pairs: log p of a side is the sum of its tokens times the only parameter."""

    def log_probs(params, batch):
        def of_row(inputs, segment_ids):
            return jax.ops.segment_sum(inputs, segment_ids, 65)[1:].reshape(-1, 2)

        return params["scale"] * jax.vmap(of_row)(batch.inputs, batch.segment_ids)

    run = RunConfig(output=str(tmp_path), data=DataConfig(sequence_length=90))
    rows = PreferenceRows(make_store(make_conversations(40)), 90)
    mesh = make_mesh(jax.devices()[:1])
    stage = Stage("dpo", START, 0, run)
    return Reference(
        stage, log_probs, {"pairs": rows}, {"pairs": "d"}, mesh, 3, stops=lambda: False
    )


def expected(scale):
    documents = make_conversations(40)
    sums = [int(tokens[:-1].sum(dtype=int)) for tokens, _ in documents]
    return scale * np.array(sums, np.float32).reshape(-1, 2)


def prepare(reference, scale, step):
    """The numbers that the rows are given."""
    (rows,) = reference.rows.values()
    rows.reference = None
    reference.prepare({"scale": jnp.float32(scale)}, step)
    return rows.reference


def test_it_is_computed_once(reference, monkeypatch):
    np.testing.assert_array_equal(prepare(reference, 0.5, START), expected(0.5))
    # Other parameters before the first step, after a run that went back.
    np.testing.assert_array_equal(prepare(reference, 0.25, START), expected(0.25))
    monkeypatch.setattr(Reference, "_compute", None)
    np.testing.assert_array_equal(prepare(reference, 0.25, START), expected(0.25))
    np.testing.assert_array_equal(prepare(reference, 7, START + 2), expected(0.25))


def test_another_model_with_the_same_parameters_has_another(reference):
    """As after a run that was started with another base of its rotation, and stopped."""

    def another(**parts):
        run = dataclasses.replace(reference.stage.run, **parts)
        return dataclasses.replace(
            reference,
            stage=dataclasses.replace(reference.stage, run=run),
            log_probs=lambda params, batch: 2 * reference.log_probs(params, batch),
        )

    model = reference.stage.run.model
    attention = dataclasses.replace(model.attention, rope_theta=5e5)
    for parts in (
        {"model": dataclasses.replace(model, attention=attention)},
        {"compute": ComputeConfig(dtype="bfloat16")},
    ):
        np.testing.assert_array_equal(prepare(reference, 0.5, START), expected(0.5))
        np.testing.assert_array_equal(prepare(another(**parts), 0.5, START), expected(1))


def test_without_it_a_stage_is_not_resumed(reference, tmp_path):
    message = r"dpo.npz: is missing, damaged or of other pairs, .* after step 3 to repeat stage dpo"
    with pytest.raises(HymbaError, match=message):
        prepare(reference, 1, START + 1)
    prepare(reference, 1, START)
    others = dataclasses.replace(reference, digests={"pairs": "e"})
    with pytest.raises(HymbaError, match=message):
        prepare(others, 1, START + 1)
    path = tmp_path / "reference" / "dpo.npz"
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    for damaged in (content, content[:-100], b""):
        path.write_bytes(damaged)
        with pytest.raises(HymbaError, match=message):
            prepare(reference, 1, START + 1)
    np.testing.assert_array_equal(prepare(reference, 1, START), expected(1))
    prepare(reference, 1, START + 1)


def test_within_a_stage_sources_may_be_left_out_but_not_added(reference):
    def with_sources(*names):
        rows = {name: PreferenceRows(make_store(make_conversations(40)), 90) for name in names}
        return dataclasses.replace(reference, rows=rows, digests=dict.fromkeys(names, "d"))

    with_sources("pairs", "held").prepare({"scale": jnp.float32(0.5)}, START)
    np.testing.assert_array_equal(prepare(with_sources("held"), 7, START + 1), expected(0.5))
    with pytest.raises(HymbaError, match=r"dpo.npz: has nothing of new, new in stage dpo, whose"):
        with_sources("pairs", "new").prepare({"scale": jnp.float32(0.5)}, START + 1)


def test_a_run_that_is_stopped_keeps_nothing(reference, tmp_path):
    stopped = dataclasses.replace(reference, stops=lambda: True)
    assert prepare(stopped, 1, START) is None
    assert not [*tmp_path.iterdir()]
