"""Runs that distill a teacher into a student."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inference.models import TINY, byte_tokenizer, make_model

from hymba_jax.checkpoint.checkpoints import load_params
from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.save import save_model
from hymba_jax.config.data import DataConfig
from hymba_jax.config.distill import DistillConfig
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.model.abstract import abstract_model
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.training import loop

STUDENT = dataclasses.replace(TINY, layers="L", max_positions=64)
TEACHER = dataclasses.replace(STUDENT, hidden_size=24)
STEPS = 20


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        mesh = make_mesh(jax.devices()[:1])
        patch.setattr(loop, "make_mesh", lambda parallel: mesh)
        yield mesh


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    """A run from scratch with a teacher."""
    directory = tmp_path_factory.mktemp("distill")
    save_model(directory / "teacher", make_model(TEACHER), byte_tokenizer())
    (directory / "corpus").mkdir()
    for i in range(8):
        text = f"the {i} old dogs and the red hats sat. " * 20
        (directory / "corpus" / f"{i}.txt").write_text(text)
    return RunConfig(
        output=str(directory / "run"),
        model=STUDENT,
        data=DataConfig(str(directory / "corpus"), tokenizer="bytes", sequence_length=24),
        training=TrainingConfig(
            objective="distill",
            steps=STEPS,
            batch_size=4,
            schedule="constant",
            warmup_steps=0,
            learning_rate=0.01,
            log_every=1,
            checkpoint_every=10,
            keep_checkpoints=3,
            sample_tokens=0,
        ),
        distill=DistillConfig(teacher=str(directory / "teacher"), temperature=2.0, weight=1.0),
    )


def train(run):
    """The lines of metrics, without times."""
    loop.train(run, generate=lambda *_: "")
    lines = (Path(run.output) / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if "second" not in name}
        for line in lines
    ]


def divergence(teacher, student, tokens):
    """KL per token at temperature 2, from both full forward passes in float64."""
    log_probs = []
    for model in (teacher, student):
        logits = np.asarray(nnx.jit(model)(tokens), np.float64) / 2
        log_probs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return (np.exp(log_probs[0]) * (log_probs[0] - log_probs[1])).sum(-1).mean()


@pytest.mark.slow
def test_a_student_moves_towards_its_teacher_and_resumes_exactly(run, one_device):
    """By text that neither has learned: the teacher's parameters are random."""
    lines = train(run)
    assert lines[-1]["divergence"] < 0.8 * lines[0]["divergence"]
    for line in lines:
        assert line["loss"] == pytest.approx(4 * line["divergence"], rel=1e-5)
    last = lines[-1]
    bits = last["validation_bits_per_byte"] * np.log(2)  # per token that is predicted, a byte each
    assert bits == pytest.approx(last["validation_cross_entropy"], rel=0.05)
    teacher = load_model(run.distill.teacher)
    text = byte_tokenizer().encode("the old hats and the 3 red dogs")
    tokens = jnp.array([text], jnp.int32)
    found = [divergence(teacher, load_model(run.output, step=step), tokens) for step in (10, STEPS)]
    assert found[1] < 0.95 * found[0]

    copy = dataclasses.replace(run, output=f"{run.output}-resumed")
    shutil.copytree(run.output, copy.output)
    shutil.rmtree(f"{copy.output}/checkpoints/{STEPS}")
    assert train(copy) == lines
    _, like = abstract_model(STUDENT, run.compute, one_device)
    jax.tree.map(
        np.testing.assert_array_equal, load_params(copy.output, like), load_params(run.output, like)
    )

    other = make_model(TEACHER)
    other.final_norm.scale[...] += 0.1
    save_model(f"{run.output}-other", other, byte_tokenizer())
    shutil.rmtree(f"{copy.output}/checkpoints/{STEPS}")
    changed = dataclasses.replace(run.distill, teacher=f"{run.output}-other")
    with pytest.raises(HymbaError, match="has other parameters than the teacher of the run so far"):
        train(dataclasses.replace(copy, distill=changed))


@pytest.mark.slow
def test_a_mesh_of_8_devices_has_the_losses_of_one(run, monkeypatch):
    """Rows, hidden size and heads sharded, student and teacher alike; to float32 rounding."""
    training = dataclasses.replace(run.training, steps=4, checkpoint_every=4)
    few = dataclasses.replace(run, output=f"{run.output}-one", training=training)
    alone = train(few)
    mesh = make_mesh(jax.devices()[:8], ParallelConfig(data=2, fsdp=2, tensor=2))
    monkeypatch.setattr(loop, "make_mesh", lambda parallel: mesh)
    for line, expected in zip(
        train(dataclasses.replace(few, output=f"{run.output}-eight")), alone, strict=True
    ):
        compared = {"loss", "divergence", "validation_loss", "grad_norm"} & expected.keys()
        assert {"loss", "divergence", "grad_norm"} <= compared
        for name in compared:
            assert line[name] == pytest.approx(expected[name], rel=2e-5), name


def test_teachers_that_do_not_fit(run, tmp_path):
    def refusal(model, tokenizer=None, **data):
        save_model(tmp_path / "teacher", model, tokenizer or byte_tokenizer())
        config = dataclasses.replace(
            run,
            output=str(tmp_path / "run"),
            data=dataclasses.replace(run.data, **data),
            distill=DistillConfig(teacher=str(tmp_path / "teacher")),
        )
        with pytest.raises(HymbaError) as refused:
            train(config)
        shutil.rmtree(tmp_path / "teacher")
        assert not (tmp_path / "run").exists()  # nothing was tokenized for it
        return str(refused.value)

    small = dataclasses.replace(STUDENT, max_positions=16)
    assert "the teacher has 16 positions, data.sequence_length is 24" in refusal(make_model(small))
    large = dataclasses.replace(STUDENT, vocab_size=300)
    assert "the teacher's vocabulary has 300 rows, that of the model 259" in refusal(
        make_model(large)
    )
    rotated = dataclasses.replace(
        STUDENT.attention, rope_type="dynamic_ntk", rope_original_positions=26
    )
    dynamic = make_model(dataclasses.replace(STUDENT, attention=rotated))
    assert 'the teacher\'s rope_type "dynamic_ntk" does not go with data.packing "documents"' in (
        refusal(dynamic, packing="documents")
    )
    swapped = Tokenizer(byte_tokenizer().model, "</s>", "<s>")
    assert "the teacher's tokenizer is another than the run's" in refusal(
        make_model(STUDENT), swapped
    )


def test_options_that_are_refused(run):
    def problem(**changes):
        with pytest.raises(HymbaError) as refused:
            dataclasses.replace(run, **changes)
        return str(refused.value)

    assert "there is no teacher: name one" in problem(distill=DistillConfig())
    plain = dataclasses.replace(run.training, objective="next_token")
    assert "[distill] has no effect without an objective" in problem(training=plain)
    for option in ({"temperature": 0.0}, {"weight": 0.0}, {"weight": 1.5}):
        with pytest.raises(HymbaError, match=f"distill config: {next(iter(option))} is"):
            DistillConfig(**option)
