"""Conversations to shards with masks, whose bytes depend on files and options alone."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from data.chat import TEMPLATE, expected_tokens, record, write_lines
from data.interrupted import tokenize_interrupted

from hymba_jax import cli
from hymba_jax.data import tokenize_command, tokenize_records
from hymba_jax.data.show_examples import BRACKETS, examples
from hymba_jax.data.tokenize_command import TokenizeConfig, TokenizeDataConfig
from hymba_jax.data.tokenized import TokenizedCorpus, damage
from hymba_jax.errors import HymbaError

RECORDS = [
    record(*(random.Random(f"{number} {turn}").choice(["é", "Hi", "</s>"]) * (number % 7 + 1)
             for turn in range(2 + number % 3 * 2)))
    for number in range(40)
]  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    """Files of a few records, in units and shards of few."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for start in range(0, len(RECORDS), 10):
        write_lines(directory / f"{start:02}.jsonl", RECORDS[start : start + 10])
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tokenize_records, "UNIT_BYTES", 2_000)
    monkeypatch.setattr(tokenize_records, "SHARD_TOKENS", 300)


def tokenize(corpus, output, data=None, **options):
    settings = {"format": "chat", "validation_fraction": 0.3} | (data or {})
    options = {"tokenizer": "bytes", "workers": 1} | options
    template = str(corpus.parent / "chat.jinja")
    config = TokenizeDataConfig(str(corpus), **settings)
    tokenize_command.main(TokenizeConfig(str(output), config, chat_template=template, **options))
    return output


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def documents(store):
    borders = [*store.document_starts(0, store.num_tokens).tolist(), store.num_tokens]
    return [
        (store.read(start, stop).tolist(), store.read_mask(start, stop).tolist())
        for start, stop in pairwise(borders)
    ]


@pytest.mark.parametrize(("workers", "loss_on"), [(1, "all"), (2, "last")])
def test_shards_hold_conversations_and_where_the_loss_is(small, corpus, tmp_path, workers, loss_on):
    """No tokens but those that the template writes; on each side in the order of the files."""
    output = tokenize(corpus, tmp_path / "out", {"loss_on": loss_on}, workers=workers)
    opened = TokenizedCorpus.open(output)
    assert opened.format == "chat"
    train, validation = documents(opened.train), documents(opened.validation)
    expected = [expected_tokens(each, loss_on) for each in RECORDS]
    assert [each for each in expected if each in train] == train
    assert sorted(train + validation) == sorted(expected)
    assert min(len(train), len(validation)) > 5
    assert len(opened.manifest.train.shards) > 3
    assert not [*damage(output)]
    for shard in opened.manifest.train.shards:
        mask = np.fromfile(output / f"{shard.name}.mask", np.uint8)
        assert len(mask) == shard.tokens
        assert {*mask.tolist()} == {0, 1}


def test_interrupted_the_bytes_are_the_same(small, corpus, tmp_path, monkeypatch):
    expected = contents(tokenize(corpus, tmp_path / "whole"))
    output = tmp_path / "stopped"
    stops = tokenize_interrupted(lambda: tokenize(corpus, output), output, monkeypatch, 0.1)
    assert stops > 2
    assert contents(output) == expected


@pytest.mark.parametrize("suffix", [".mask", ".mask.crc"])
def test_damage_to_a_mask_is_noticed(corpus, tmp_path, suffix):
    output = tokenize(corpus, tmp_path / "out")
    store = TokenizedCorpus.open(output).train
    store.read_mask(0, store.num_tokens)
    path = output / f"train-00000-000{suffix}"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    store = TokenizedCorpus.open(output).train
    store.read(0, store.num_tokens)
    with pytest.raises(HymbaError, match=f"train-00000-000{suffix}: damaged"):
        store.read_mask(0, store.num_tokens)
    assert any(line.startswith(f"{path}: damaged") for line in damage(output))
    path.write_bytes(content[:-1])
    with pytest.raises(HymbaError, match=f"{path}: .* bytes, but the manifest says"):
        TokenizedCorpus.open(output)


def test_bad_records_are_skipped_and_listed(corpus, tmp_path):
    write_lines(corpus / "99.jsonl", [record("no answer"), record("a", "b")])
    with pytest.raises(HymbaError, match=r"99.jsonl:1: no answer.*, or set data.on_bad_record"):
        tokenize(corpus, tmp_path / "stop")
    output = tokenize(corpus, tmp_path / "skip", {"on_bad_record": "skip"})
    manifest = TokenizedCorpus.open(output).manifest
    assert manifest.skipped == 1
    assert manifest.train.documents + manifest.validation.documents == len(RECORDS) + 1
    (line,) = (output / "units" / "00000.skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "99.jsonl:1"


def test_other_options_or_another_template_are_refused(corpus, tmp_path):
    tokenize(corpus, tmp_path / "out")
    with pytest.raises(HymbaError, match="was begun with loss_on 'all', which is 'last' now"):
        tokenize(corpus, tmp_path / "out", {"loss_on": "last"})
    with pytest.raises(HymbaError, match="was begun with format 'chat', which is None now"):
        tokenize(corpus, tmp_path / "out", {"format": "text"})
    (tmp_path / "chat.jinja").write_text(TEMPLATE.replace(">", ")"))
    with pytest.raises(HymbaError, match="was begun with another tokenizer than bytes is now"):
        tokenize(corpus, tmp_path / "out")


def test_what_the_loss_is_on_is_shown(corpus, tmp_path, capsys):
    """In brackets, and on a terminal in color; control tokens by their names."""
    path = write_lines(tmp_path / "two.jsonl", [record("é", "<s>", "c", "d"), record("e", "f")])
    options = ("--data.format", "chat", "--data.validation-fraction", "0", "--tokenizer", "bytes")
    options += ("--chat-template", tmp_path / "chat.jinja", "--output", tmp_path / "out")
    cli.main(["tokenize", "--data.path", str(path), *map(str, options), "--show", "2"])
    on, off = BRACKETS
    first, second = capsys.readouterr().out.partition("--- train 2: ")[::2]
    assert first.endswith(
        "--- train 1: 19 tokens, the loss is on 6\n"
        f"u>é</s>a>{on}<s></s>{off}u>c</s>a>{on}d</s>{off}\n"
    )
    assert second == f"8 tokens, the loss is on 2\nu>e</s>a>{on}f</s>{off}\n"
    (example,) = examples(TokenizedCorpus.open(tmp_path / "out"), 1)
    colored = [example.plain[span.start : span.end] for span in example.spans if span.style]
    assert colored == [f"{on}<s></s>{off}", f"{on}d</s>{off}"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--tokenizer", "bytes"), "^error: bytes: has no chat template"),
        (("--tokenizer", "bpe:300"), "tokenizer bpe:300 is trained on text"),
        (("--tokenizer", "bytes", "--chat-template", "/no/such"), "/no/such"),
    ],
)
def test_what_the_command_refuses(corpus, tmp_path, options, problem):
    command = ["tokenize", "--data.path", str(corpus), "--data.format", "chat"]
    with pytest.raises(SystemExit, match=problem):
        cli.main([*command, "--output", str(tmp_path / "out"), *options])
    assert not [*(tmp_path / "out").glob("*.json")]
