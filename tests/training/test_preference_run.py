"""Runs of preference optimization: stages behind others, adapters, and what a run keeps."""

import dataclasses
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from data.chat import TEMPLATE, chat_tokenizer, write_lines
from flax import nnx
from flax.traverse_util import flatten_dict
from inference.models import TINY, make_model

from hymba_jax.checkpoint.checkpoints import load_params
from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.save import save_model
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.config.data import DataConfig, SourceConfig, WeightedSourceConfig
from hymba_jax.config.dpo import DPOConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import StageConfig, StageSourceConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data import open_data
from hymba_jax.errors import HymbaError
from hymba_jax.model.abstract import abstract_model
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.training import loop

MODEL = dataclasses.replace(TINY, layers="L", max_positions=64)
WORDS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx"]
PAIRS = [
    {"prompt": f"say {word}", "chosen": word * (1 + number % 3), "rejected": word.upper()}
    for number, word in enumerate(WORDS)
]
STEPS = 9
CHATS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """SFT and then DPO, from a model."""
    directory = tmp_path_factory.mktemp("dpo")
    save_model(directory / "model", make_model(MODEL), chat_tokenizer(TEMPLATE))
    data = {
        "chats": WeightedSourceConfig(str(write_lines(directory / "chats.jsonl", CHATS))),
        "pairs": WeightedSourceConfig(
            str(write_lines(directory / "pairs.jsonl", PAIRS)), format="preference"
        ),
    }
    return RunConfig(
        output=str(directory / "run"),
        init_from=str(directory / "model"),
        model=MODEL,
        data=DataConfig(
            sources=data,
            format="chat",
            tokenizer=str(directory / "model"),
            sequence_length=64,
            packing="documents",
            validation_packing="documents",
            validation_fraction=0.3,
        ),
        training=TrainingConfig(
            batch_size=2,
            schedule="constant",
            warmup_steps=0,
            learning_rate=0.002,
            log_every=1,
            checkpoint_every=1,
            keep_checkpoints=STEPS,
            sample_tokens=0,
        ),
        dpo=DPOConfig(beta=0.5),
        stages={
            "sft": StageConfig(1, sources={"chats": StageSourceConfig()}),
            "dpo": StageConfig(STEPS - 1, objective="dpo", sources={"pairs": StageSourceConfig()}),
        },
    )


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        mesh = make_mesh(jax.devices()[:1])
        patch.setattr(loop, "make_mesh", lambda parallel: mesh)
        yield mesh


@pytest.fixture(scope="module")
def run(config, one_device):
    """The config, trained."""
    train(config)
    return config


def train(run):
    """The lines of metrics, without times."""
    loop.train(run, generate=lambda *_: "")
    lines = (Path(run.output) / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if "second" not in name}
        for line in lines
    ]


def copied(run, name, steps):
    """The run as it was after so many steps."""
    copy = dataclasses.replace(run, output=f"{run.output}-{name}")
    shutil.copytree(run.output, copy.output)
    for step in range(steps + 1, STEPS + 1):
        shutil.rmtree(f"{copy.output}/checkpoints/{step}")
    return copy


def stored(run, mesh):
    _, like = abstract_model(MODEL, run.compute, mesh, run.adapter)
    return load_params(run.output, like)


def test_a_stage_after_another_resumes_exactly(run, one_device, capsys):
    lines = train(run)
    assert [line["stage"] for line in lines] == ["sft", *["dpo"] * (STEPS - 1)]
    first, last = lines[1], lines[-1]
    # Before the first step the model is its reference, to the rounding of another program.
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < np.log(2) - 0.1
    assert last["reward_accuracy"] == 1
    assert {"validation_loss", "validation_reward_margin", "validation_kl"} <= last.keys()

    copy = copied(run, "resumed", 4)
    capsys.readouterr()
    assert train(copy) == lines
    said = capsys.readouterr().out
    assert f"stage dpo: dpo, steps 2 to {STEPS}" in said
    assert re.search(r"loss 0\.\d+  val loss \d\.\d+  accuracy 100%  margin \d", said)
    jax.tree.map(np.testing.assert_array_equal, stored(copy, one_device), stored(run, one_device))


def test_what_a_resumed_stage_refuses(run):
    copy = copied(run, "refused", 4)
    other = dataclasses.replace(copy, dpo=DPOConfig(beta=0.4))
    with pytest.raises(HymbaError, match=r"stages.dpo: dpo.beta was 0.5, is 0.4"):
        train(other)


def test_the_reference_is_the_model_before_the_stage(run):
    """From its checkpoint: of all pairs, by packed rows there and one by one here."""
    model = nnx.jit(load_model(run.output, step=1))
    data = open_data(run.data, Tokenizer.load(run.output), run.output)
    stores = {f"training source {name}": each.store for name, each in data.train.items()}
    stores |= {f"validation source {name}": each.store for name, each in data.validation.items()}
    arrays = np.load(f"{run.output}/reference/dpo.npz")
    assert {*arrays} == {"about", "training source pairs", "validation source pairs"}
    for name in {*arrays} - {"about"}:
        store = stores[name]
        starts = [*store.document_starts(0, store.num_tokens).tolist(), store.num_tokens]
        expected = [
            log_prob(model, store.read(start, stop).astype(int), store.read_mask(start, stop))
            for start, stop in pairwise(starts)
        ]
        np.testing.assert_allclose(arrays[name].ravel(), expected, rtol=1e-5)


def log_prob(model, tokens, mask):
    """Of the answer tokens of a document, in float64."""
    padded, size = np.zeros((1, 64), np.int32), len(tokens) - 1
    padded[0, :size] = tokens[:-1]
    logits = np.asarray(model(padded)[0, :size], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_probs[np.arange(size), tokens[1:]][mask[1:]].sum()


@pytest.mark.slow
def test_an_adapter_alone_is_trained_and_its_reference_is_the_base(config, one_device):
    run = dataclasses.replace(
        config,
        output=f"{config.output}-adapter",
        adapter=AdapterConfig(kind="lora", rank=2),
        data=dataclasses.replace(
            config.data, sources={"pairs": config.data.sources["pairs"]}, format="preference"
        ),
        training=dataclasses.replace(config.training, steps=3, objective="dpo"),
        stages={},
    )
    lines = train(run)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert lines[-1]["kl"] != 0
    base = flatten_dict(nnx.to_pure_dict(nnx.state(load_model(config.init_from))))
    for path, leaf in flatten_dict(stored(run, one_device)).items():
        if "adapter" not in path:
            np.testing.assert_array_equal(leaf, base[path])


def changed(config, **training):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def test_objectives_and_data_that_do_not_go_together(config, one_device):
    """Said before any text is tokenized."""
    swapped = {
        name: dataclasses.replace(stage, sources={source: StageSourceConfig()})
        for (name, stage), source in zip(config.stages.items(), ("pairs", "pairs"), strict=True)
    }
    other = dataclasses.replace(config, output=f"{config.output}-swapped", stages=swapped)
    with pytest.raises(HymbaError, match=r"stage sft: objective is next_token, and data.sources.p"):
        train(other)
    assert not Path(other.output).exists()
    stages = {"dpo": dataclasses.replace(config.stages["dpo"], sources={})}
    other = dataclasses.replace(config, output=f"{config.output}-both", stages=stages)
    with pytest.raises(HymbaError, match=r"objective is dpo, and data.sources.chats has no pairs"):
        train(other)
    chats = config.data.sources["chats"].path
    data = dataclasses.replace(config.data, sources={}, path=chats, format="chat")
    with pytest.raises(HymbaError, match=r"objective is dpo, and data.path has no pairs"):
        train(dataclasses.replace(other, data=data))
    held_out = {"held": SourceConfig(chats, format="chat")}
    data = dataclasses.replace(config.data, validation=held_out)
    other = dataclasses.replace(config, output=f"{config.output}-held", data=data)
    with pytest.raises(HymbaError, match="stage dpo: there are no validation pairs: name some"):
        train(other)
    stages = {"dpo": dataclasses.replace(config.stages["dpo"], validate_on=("chats",))}
    other = dataclasses.replace(config, output=f"{config.output}-on", stages=stages)
    with pytest.raises(
        HymbaError, match=r"stage dpo: training\.validate_on names no source of val"
    ):
        train(other)
    assert not Path(other.output).exists()


def test_options_without_effect_are_refused(config):
    with pytest.raises(HymbaError, match=r"\[dpo\] has no effect without an objective"):
        dataclasses.replace(config, stages={"sft": config.stages["sft"]})
    with pytest.raises(HymbaError, match=r"stages.dpo: training config: z_loss is 0.1, and obj"):
        changed(config, z_loss=0.1)
    with pytest.raises(HymbaError, match="reduction_shards has no fixed order for the reference"):
        changed(config, reduction_shards=2)
