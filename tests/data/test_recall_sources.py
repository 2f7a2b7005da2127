"""Generated tasks as sources of a run, beside others and alone."""

import dataclasses
import json

import numpy as np
import pytest

from hymba_jax.config.data import SourceConfig, WeightedSourceConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.data import (
    IGNORED_TARGET,
    DataConfig,
    open_data,
    source_formats,
    tokenize_sources,
    train_batches,
)
from hymba_jax.data.recall import RecallTask
from hymba_jax.data.tokenize_command import TokenizeConfig, TokenizeDataConfig
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.training.arguments import parse_run

PACKED = {"packing": "documents", "validation_packing": "documents"}
TASKS = {
    "mqar": RecallTask("mqar", 16, pairs=4),
    "copying": RecallTask("selective_copying", 24, pairs=6, vocab_size=40),
    "induction": RecallTask("induction", 48),
}
PATHS = {
    "mqar": "mqar:4:16",
    "copying": "selective_copying:6:24:40",
    "induction": "induction:1:48:64",
}


def config(sources=PATHS, validation=PATHS, **options):
    return DataConfig(
        sources={name: WeightedSourceConfig(path) for name, path in sources.items()},
        validation={name: SourceConfig(path) for name, path in validation.items()},
        **{"tokenizer": "bytes", "sequence_length": 48} | PACKED | options,
    )


def prepare(data, output):
    tokenize_sources(data, None, str(output), str, Display(quiet=True))
    return open_data(data, None, str(output))


def documents(row, task):
    """The inputs of the documents of a packed row."""
    return [document.tobytes() for document in row.inputs.reshape(-1, task.length)]


def test_rows_are_documents_of_the_tasks(tmp_path):
    data = config()
    (examples,) = prepare(data, tmp_path).train_examples([(data, 0)], seed=3)
    batch = next(train_batches(examples, 9))
    seen = []
    for i in range(9):
        row = batch._replace(**{name: getattr(batch, name)[i] for name in batch._fields[:3]})
        source, epoch, index = examples.origin(i)
        task = TASKS[source]
        count = 48 // task.length
        expected = [task.row(0, index * count + j) for j in range(count)]
        np.testing.assert_array_equal(row.inputs, np.concatenate([e.inputs for e in expected]))
        np.testing.assert_array_equal(row.targets, np.concatenate([e.targets for e in expected]))
        np.testing.assert_array_equal(row.segment_ids, np.repeat(1 + np.arange(count), task.length))
        seen.append(source)
        assert epoch == 0
    assert {name: seen.count(name) for name in TASKS} == dict.fromkeys(TASKS, 3)


def test_other_seeds_read_other_rows_and_batches_after_any_step_are_the_same(tmp_path):
    data = config()
    opened = prepare(data, tmp_path)
    origins = []
    for seed in (0, 1):
        (examples,) = opened.train_examples([(data, 0)], seed)
        origins.append([examples.origin(i) for i in range(30)])
        batches, resumed = train_batches(examples, 4), train_batches(examples, 4, start=2)
        for _ in range(2):
            next(batches)
        np.testing.assert_array_equal(next(batches).inputs, next(resumed).inputs)
    assert not {*origins[0]} & {*origins[1]}


@pytest.mark.parametrize("name", TASKS)
def test_validation_has_rows_of_its_own(tmp_path, name):
    data, task = config({name: PATHS[name]}, {name: PATHS[name]}), TASKS[name]
    opened = prepare(data, tmp_path)
    (examples,) = opened.train_examples([(data, 0)], seed=0)
    held_out = opened.validation_sets(data)[name]
    rows = [held_out.rows[i] for i in range(len(held_out.rows))]
    found = {document for row in rows for document in documents(row, task)}
    trained = {d for i in range(500) for d in documents(examples.rows[name][i], task)}
    assert len(found) > 500
    assert not found & trained
    assert held_out.loss_weight == sum((row.targets != IGNORED_TARGET).sum() for row in rows)
    assert held_out.bits_per_byte(1.0) is None


def test_digests_are_of_what_is_generated(tmp_path):
    """A vocabulary that is named is that of the default."""
    paths = ["mqar:4:16", "mqar:4:16:64", "mqar:4:16:62", "mqar:4:24", "selective_copying:4:16"]
    digests = []
    for path in paths:
        data = config({"a": path}, {"a": path})
        digests.append(prepare(data, tmp_path).digests)
    assert digests[0] == digests[1]
    values = [value for each in digests[1:] for value in each.values()]
    assert len(set(values)) == len(values) == 8


def test_a_task_beside_text_that_is_held_out(tmp_path):
    """The text trains the BPE, and is what is validated with, whose packing is its own."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"document {i} " * 9}) for i in range(60)))
    sources = {"text": str(corpus), "recall": "mqar:4:16"}
    data = config(sources, {}, tokenizer="bpe:270", validation_packing="concat")
    RunConfig(data=data)
    opened = prepare(data, tmp_path / "run")
    assert opened.tokenizer.vocab_size == 270
    assert list(opened.validation) == ["text"]
    alone = prepare(dataclasses.replace(data, sources={"text": data.sources["text"]}), tmp_path)
    assert opened.num_tokens == alone.num_tokens
    assert opened.notes == (
        "data.sources.recall: is generated: 1,048,576 sequences",
        "mqar:4:16: has no held-out documents, so validation is without it",
    )
    assert source_formats(data, str(tmp_path)).train == {"text": "text", "recall": "text"}


def test_a_file_of_that_name_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mqar:4:16").write_text("text")
    arguments = ["--data.path", "mqar:4:16", "--data.packing", "documents"]
    path = parse_run(arguments, "train.py")[0].data.path
    data = dataclasses.replace(config({}), path=path)
    assert prepare(data, tmp_path / "run").num_tokens == 0
    (tmp_path / "mqar:4:16").unlink()
    assert prepare(data, tmp_path / "run").num_tokens == 0


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("mqar:8", {}, "data.sources.a: mqar:8: a generated task is TASK:PAIRS:LENGTH or"),
        ("mqar:2:8:64:1", {}, "data.sources.a: mqar:2:8:64:1: a generated task is TASK:PAIRS"),
        ("mqar:-2:8", {}, "data.sources.a: mqar:-2:8: a generated task is TASK:PAIRS:LENGTH"),
        ("mqar:8:16", {}, "data.sources.a: mqar: 8 pairs take 24 tokens, length is 16"),
        ("mqar:8:24:8", {}, "data.sources.a: mqar: 8 pairs take as many keys, a vocab_size of 8"),
        ("induction:2:8", {}, "data.sources.a: induction: has one pair, not 2: set 1"),
        (
            "mqar:2:8:300",
            {},
            "data.sources.a: mqar:2:8:300 has a vocabulary of 300 tokens, the tokenizer has 259: "
            "choose a smaller vocabulary, or another data.tokenizer",
        ),
        ("mqar:2:7", {}, "data.sources.a: mqar: rows of 7 tokens do not fill a sequence of 48: le"),
        ("mqar:20:60", {}, "data.sources.a: mqar: rows of 60 tokens do not fill a sequence of 48"),
        (
            "mqar:2:8",
            {"tokenizer": "bpe:300"},
            "data.tokenizer bpe:300 is trained on text, and no source of training is text",
        ),
        ("mqar:2:8", {"validation": {}}, "mqar:2:8: no validation documents: name some in"),
        ("mqar:2:8", {"loss_on": "last"}, "data.loss_on is of conversations, and no source has"),
        ("mqar:2:8", {"packing": "concat"}, "mqar:2:8: conversations and generated tasks are"),
    ],
)
def test_what_cannot_be_generated_is_refused(tmp_path, path, options, message):
    data = config({"a": path}, **{"validation": {"a": "mqar:2:8"}} | options)
    with pytest.raises(HymbaError) as caught:
        prepare(data, tmp_path).train_examples([(data, 0)], seed=0)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "option", [{"text_field": "a"}, {"format": "chat"}, {"token_dtype": "uint16"}], ids=str
)
def test_options_of_files_are_refused(option):
    (name,) = option
    message = f"validation.a.{name} has no effect on mqar:2:8, which is generated: leave it out"
    with pytest.raises(HymbaError, match=message):
        DataConfig(validation={"a": SourceConfig("mqar:2:8", **option)})
    if name != "token_dtype":
        with pytest.raises(HymbaError, match=f"data config: {name} has no effect, as "):
            config(**option)


@pytest.mark.parametrize("packing", PACKED)
def test_a_config_that_packs_a_task_as_a_stream_is_refused(packing):
    message = f'generated tasks are isolated documents: set data.{packing} to "documents"'
    with pytest.raises(HymbaError, match=message):
        RunConfig(data=config(**{packing: "concat"}))


def test_there_is_nothing_to_tokenize():
    data = TokenizeDataConfig("mqar:2:8")
    with pytest.raises(HymbaError, match=r"data.path mqar:2:8 is generated: name it as a source"):
        TokenizeConfig(output="tokens", data=data, tokenizer="bytes")
