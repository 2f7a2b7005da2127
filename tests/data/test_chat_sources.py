"""Conversations as sources of a run, beside text."""

from itertools import islice
from types import MappingProxyType

import numpy as np
import pytest
from data.chat import TEMPLATE, chat_tokenizer, expected_tokens, record, write_lines

from hymba_jax import cli
from hymba_jax.config.data import SourceConfig, WeightedSourceConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.data import DataConfig, open_data, tokenize_sources, train_batches
from hymba_jax.data.batch import IGNORED_TARGET
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import Tokenizer

RECORDS = [record(f"question {number}", "é" * (number % 5 + 1)) for number in range(30)]


@pytest.fixture
def chats(tmp_path):
    return write_lines(tmp_path / "chats.jsonl", RECORDS)


@pytest.fixture
def text(tmp_path):
    return write_lines(tmp_path / "text.jsonl", [{"text": "some text " * 9} for _ in range(9)])


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "run")


def config(path="", **options):
    packing = {"packing": "documents", "validation_packing": "documents", "format": "chat"}
    options = {"tokenizer": "bytes", "sequence_length": 64, **packing} | options
    return DataConfig(path=str(path), **options)


def prepare(data, output, tokenizer=None, trained_on=MappingProxyType({})):
    tokenize_sources(data, tokenizer, output, str, Display(quiet=True), trained_on=trained_on)
    return open_data(data, tokenizer, output)


def tokenize(chats, output, *options):
    command = ["tokenize", "--data.path", chats, "--output", output, "--tokenizer", "bytes"]
    cli.main([*map(str, command), *map(str, options)])
    return output


CHAT = ("--data.format", "chat")


def found_conversations(rows):
    """The targets of each segment."""
    for index in range(len(rows)):
        row = rows[index]
        for segment in range(1, row.segment_ids.max() + 1):
            yield row.targets[row.segment_ids == segment].tolist()


def test_a_run_trains_on_answers_and_keeps_the_template(chats, template, output):
    data = config(chats, chat_template=str(template), validation_fraction=0.3)
    opened = prepare(data, output)
    assert opened.tokenizer.chat_template == TEMPLATE
    (examples,) = opened.train_examples([(data, 0)], seed=0)
    (held_out,) = opened.validation_sets(data).values()
    assert held_out.bits_per_byte(1.0) is None
    assert examples.left_out() == opened.validation_left_out(data) == []

    expected = []
    for ids, mask in map(expected_tokens, RECORDS):
        pairs = zip(ids[1:], mask[1:], strict=True)
        expected.append([token if is_answer else IGNORED_TARGET for token, is_answer in pairs])
    rows = examples.rows["corpus"]
    found = [*found_conversations(rows), *found_conversations(held_out.rows)]
    assert sorted(found) == sorted(expected)
    assert rows.num_targets + held_out.rows.num_targets == sum(
        token != IGNORED_TARGET for targets in expected for token in targets
    )

    template.unlink()  # a run that is resumed reads neither
    chats.unlink()
    tokenizer = Tokenizer.load(f"{output}/tokens/train/corpus")
    assert tokenizer.chat_template == TEMPLATE
    again = prepare(data, output, tokenizer, opened.digests)
    assert again.digests == opened.digests


def test_batches_resume_exactly(chats, template, output):
    data = config(chats, chat_template=str(template))
    (examples,) = prepare(data, output).train_examples([(data, 0)], seed=3)
    through = islice(train_batches(examples, 2), 4, 9)
    for wanted, batch in zip(through, train_batches(examples, 2, start=4), strict=False):
        for field, expected in zip(batch, wanted, strict=True):
            np.testing.assert_array_equal(field, expected)


def test_beside_text(chats, text, template, output):
    """A tokenizer is trained on the text alone; packed rows of both have the same fields."""
    sources = {
        "chats": WeightedSourceConfig(str(chats), format="chat", weight=0.5),
        "text": WeightedSourceConfig(str(text), weight=0.5),
    }
    options = {"tokenizer": "bpe:270", "chat_template": str(template), "format": "text"}
    data = config(sources=sources, validation_fraction=0.5, **options)
    opened = prepare(data, output)
    assert len(opened.tokenizer.encode("question")) == 8
    assert len(opened.tokenizer.encode("some text")) < 9
    (examples,) = opened.train_examples([(data, 0)], seed=0)
    batch = next(train_batches(examples, 4))
    is_target = batch.targets != IGNORED_TARGET
    of_text = [origin.source == "text" for origin in map(examples.origin, range(4))]
    assert sum(of_text) == 2
    # All of a text but its first token are targets.
    assert (is_target == (batch.segment_ids > 0)).all(1).tolist() == of_text
    held = text.with_name("held.jsonl")
    held.write_text('{"text": "held out"}')
    options = {"loss_on": "last", "format": "text", "validation": {"held": SourceConfig(str(held))}}
    alone = config(text, **options)
    with pytest.raises(HymbaError, match=r"data\.loss_on is of conversations, and no source has"):
        prepare(alone, f"{output}1")
    with pytest.raises(HymbaError, match="bpe:270 is trained on text, and no source of training"):
        prepare(config(chats, tokenizer="bpe:270"), f"{output}2")


def test_tokenized_beside_text_that_was_tokenized_without_a_template(
    chats, text, template, tmp_path, output
):
    options = (*CHAT, "--chat-template", template)
    sources = {
        "text": WeightedSourceConfig(str(tokenize(text, tmp_path / "a")), format="text"),
        "chats": WeightedSourceConfig(str(tokenize(chats, tmp_path / "b", *options))),
    }
    data = config(sources=sources)
    opened = prepare(data, output)
    assert opened.tokenizer.chat_template == TEMPLATE
    assert [tokens.store.has_mask for tokens in opened.train.values()] == [False, True]

    with pytest.raises(HymbaError, match=r'loss_on "all", data.loss_on is "last"'):
        prepare(config(sources=sources, loss_on="last"), output)
    mixed = {**sources, "text": WeightedSourceConfig(sources["text"].path)}
    with pytest.raises(HymbaError, match=r"tokenized as text.*format of data.sources.text to"):
        prepare(config(sources=mixed), output)
    with pytest.raises(HymbaError, match="with another chat template than the run's"):
        open_data(data, chat_tokenizer(TEMPLATE + " "), output)
    path = {"path": sources["chats"].path, "format": "text"}
    with pytest.raises(HymbaError, match='set packing to "documents"'):
        prepare(config(**path, packing="concat"), output).train_examples(
            [(config(**path, packing="concat"), 0)], seed=0
        )
    with pytest.raises(HymbaError, match='set validation_packing to "documents"'):
        opened.validation_sets(config(**path, validation_packing="concat"))


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_what_does_not_fit_is_counted(chats, template, output, too_long):
    options = (*CHAT, "--chat-template", template, "--data.validation-fraction", 0)
    tokenized = tokenize(chats, chats.with_name("all"), *options)
    data = config(
        chats, chat_template=str(template), too_long=too_long, sequence_length=22,
        validation={"all": SourceConfig(str(tokenized))},
    )  # fmt: skip
    opened = prepare(data, output)
    lengths = [len(ids) for ids, _ in map(expected_tokens, RECORDS)]
    count = sum(length > 23 for length in lengths)
    assert 0 < count < len(lengths)
    (examples,) = opened.train_examples([(data, 0)], seed=0)
    verb = "truncated" if too_long == "truncate" else "dropped"
    line = f"of 30 conversations {count} {verb}, as they do not fit rows of 22 tokens"
    assert examples.left_out() == [f"corpus: {line}"]
    assert opened.validation_left_out(data) == [f"validation source all: {line}"]
    short = config(chats, sequence_length=8)
    with pytest.raises(HymbaError, match="no conversations fit a sequence of 8 tokens"):
        opened.train_examples([(short, 0)], seed=0)


def test_a_run_without_a_template_is_refused_before_anything_is_tokenized(chats, text, output):
    sources = {
        "text": WeightedSourceConfig(str(text), format="text"),
        "chats": WeightedSourceConfig(str(chats)),
    }
    with pytest.raises(HymbaError, match=r"has no chat template.*: give the file of one"):
        prepare(config(sources=sources), output)


def test_a_config_that_packs_conversations_as_a_stream_is_refused(tmp_path):
    with pytest.raises(HymbaError, match="format is chat, but there is no path"):
        DataConfig(format="chat")
    problem = "conversations and generated tasks are isolated documents: set data.{} to"
    for name in ("packing", "validation_packing"):
        with pytest.raises(HymbaError, match=problem.format(name)):
            RunConfig(data=config("a", **{name: "concat"}))
    text, chat = WeightedSourceConfig("a", format="text"), WeightedSourceConfig("b", weight=0)
    windows = {"packing": "concat", "validation_packing": "concat"}
    RunConfig(data=config(sources={"text": text, "unused": chat}, **windows))
    path = tmp_path / "run.toml"
    path.write_text(
        'stages = [{name = "one", steps = 1, packing = "concat"}]\n'
        '[data]\npath = "a"\nformat = "chat"\nvalidation_packing = "documents"'
    )
    with pytest.raises(HymbaError, match=f"stages.one: .*{problem.format('packing')}"):
        RunConfig.from_toml(path)
    path.write_text(path.read_text().replace("concat", "documents"))
    RunConfig.from_toml(path)
