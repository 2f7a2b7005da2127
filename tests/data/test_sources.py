import dataclasses
import json
import os
import shutil
from collections import Counter
from itertools import islice, pairwise
from types import MappingProxyType

import numpy as np
import pytest

from hymba_jax import cli
from hymba_jax.config.data import SourceConfig, WeightedSourceConfig
from hymba_jax.data import (
    IGNORED_TARGET,
    DataConfig,
    open_data,
    source_formats,
    tokenize_sources,
    train_batches,
)
from hymba_jax.data.megatron import MegatronWriter
from hymba_jax.data.sources import open_sources
from hymba_jax.data.token_files import digest_of
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import Tokenizer, build_tokenizer

TEXTS = [f"document {number}: {'δ' * number}" for number in range(60)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "run")


def config(path="", **options):
    options = {"tokenizer": "bytes", "sequence_length": 16, "validation_fraction": 0.2} | options
    return DataConfig(path=str(path), **options)


def prepare(data, output, tokenizer=None, trained_on=MappingProxyType({})):
    tokenize_sources(data, tokenizer, output, str, Display(quiet=True), trained_on=trained_on)
    return open_sources(data, tokenizer, output)


def train_examples(data, output):
    (examples,) = open_data(data, None, output).train_examples([(data, 0)], seed=0)
    return examples


def documents(tokens):
    store = tokens.store
    borders = [*store.document_starts(0, store.num_tokens).tolist(), store.num_tokens]
    return [store.read(start, stop).tolist() for start, stop in pairwise(borders)]


def test_text_is_tokenized_once(corpus, output):
    sources = prepare(config(corpus), output)
    train, validation = sources.train["corpus"], sources.validation["corpus"]
    found = [*documents(train), *documents(validation)]
    expected = [[1, *sources.tokenizer.encode(text), 2] for text in TEXTS]
    assert sorted(found) == sorted(expected)
    assert validation.text_bytes == sum(len(ids) - 2 for ids in documents(validation))
    corpus.unlink()  # it is not read again, nor the tokenizer trained
    tokenizer = Tokenizer.load(f"{output}/tokens/train/corpus")
    again = prepare(config(corpus), output, tokenizer, {"training source corpus": train.digest})
    assert again.train["corpus"].digest == train.digest


def test_tokens_of_other_text_or_options_are_made_again(corpus, output):
    """Where no checkpoint depends on them."""
    first = prepare(config(corpus), output)
    corpus.write_text(corpus.read_text() + "\n" + json.dumps({"text": "one more"}))
    second = prepare(config(corpus), output)
    assert (
        len(documents(second.train["corpus"])) + len(documents(second.validation["corpus"]))
        == len(TEXTS) + 1
    )
    assert second.train["corpus"].digest != first.train["corpus"].digest
    third = prepare(config(corpus, tokenizer="bpe:280"), output)
    assert third.tokenizer.vocab_size > 259
    assert third.train["corpus"].store.num_tokens < second.train["corpus"].store.num_tokens


def test_one_bpe_is_trained_on_the_training_documents_of_all_sources(tmp_path, output):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(20):
            (tmp_path / name / f"{number}.txt").write_text(f"{name * 4} {number} " * 20)
    held = tmp_path / "held.txt"
    held.write_text("zzzzzzzz " * 100)
    sources = {name: WeightedSourceConfig(str(tmp_path / name)) for name in "ab"}
    data = config(tokenizer="bpe:300", sources=sources, validation={"z": SourceConfig(str(held))})
    opened = prepare(data, output)
    assert len(opened.tokenizer.encode("aaaa")) == len(opened.tokenizer.encode("bbbb")) == 1
    assert len(opened.tokenizer.encode("zzzzzzzz")) == 8
    assert [len(documents(opened.train[name])) for name in "ab"] == [20, 20]
    assert list(opened.validation) == ["z"]
    assert opened.validation["z"].text_bytes == 900


def test_documents_of_validation_are_not_trained_on(corpus, tokenized, tmp_path, output):
    """Nor do they train the tokenizer. Of tokens, they are skipped when the text is tokenized."""
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS[3:20], "new"]))
    left = {text for text in TEXTS if text not in TEXTS[3:20]}
    data = config(validation={"held": SourceConfig(str(held))}, tokenizer="bpe:270")
    opened = prepare(dataclasses.replace(data, path=str(corpus)), output)
    decode = opened.tokenizer.decode
    assert {decode(ids) for ids in documents(opened.train["corpus"])} == left
    assert len(documents(opened.validation["held"])) == 18
    rest = tmp_path / "rest.jsonl"
    rest.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS if text in left))
    alone = prepare(dataclasses.replace(data, path=str(rest)), f"{output}2")
    assert alone.tokenizer.fingerprint == opened.tokenizer.fingerprint

    excluding = tokenize(corpus, tmp_path / "excluding", 0, "--data.exclude", held)
    tokens = prepare(dataclasses.replace(data, path=str(excluding), tokenizer="bytes"), output)
    assert {tokens.tokenizer.decode(ids) for ids in documents(tokens.train["corpus"])} == left
    skipped = (excluding / "units" / "00000.skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in skipped] == [
        f"corpus.jsonl:{number}" for number in range(4, 21)
    ]
    with pytest.raises(SystemExit, match="was begun with excluded documents"):
        tokenize(corpus, tmp_path / "excluding", 0)
    # The only document of a corpus is excluded, too, rather than cut in two.
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "new"}))
    with pytest.raises(SystemExit, match="has no documents, all are skipped"):
        tokenize(one, tmp_path / "one", 0.2, "--data.exclude", held)


def test_a_new_source_is_without_what_an_earlier_one_cut_in_two(corpus, tmp_path, output):
    """As if it had been there from the start."""
    (tmp_path / "one.txt").write_text(max(TEXTS, key=len))
    one, more = WeightedSourceConfig(str(tmp_path / "one.txt")), WeightedSourceConfig(str(corpus))
    first = prepare(config(sources={"one": one}), output)
    both = config(sources={"one": one, "more": more})
    trained_on = {"training source one": first.train["one"].digest}
    extended = prepare(both, output, first.tokenizer, trained_on)
    assert extended.train["one"].digest == first.train["one"].digest
    found = [*documents(extended.train["more"]), *documents(extended.validation["more"])]
    texts = {extended.tokenizer.decode(ids) for ids in found}
    assert texts == set(TEXTS) - {max(TEXTS, key=len)}
    assert documents(prepare(both, f"{output}2").train["more"]) == documents(extended.train["more"])


def test_what_was_trained_on_is_not_searched_for_new_validation_documents(
    corpus, tmp_path, output, capsys
):
    (tmp_path / "a.txt").write_text("held out from the start")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    a, b = (SourceConfig(str(tmp_path / name)) for name in ("a.txt", "b.jsonl"))
    first = prepare(config(corpus, validation={"a": a}), output)
    trained_on = {"training source corpus": first.train["corpus"].digest}
    trained_on |= {"validation source a": first.validation["a"].digest}
    data, said = config(corpus, validation={"a": a, "b": b}), "not searched for in data.path"
    for digests in (trained_on, {}):
        tokenize_sources(data, first.tokenizer, output, str, Display(), trained_on=digests)
        is_said = f"data.validation.b: {said}" in capsys.readouterr().out
        assert is_said == bool(digests)  # without a checkpoint the text is tokenized again


def test_the_run_directory_is_no_text(corpus, tmp_path):
    output = tmp_path / "runs" / "mine"
    first = prepare(config(tmp_path), str(output))
    (output / "tokens" / "train" / "corpus" / "manifest.json").unlink()
    assert prepare(config(tmp_path), str(output)).train["corpus"].digest == (
        first.train["corpus"].digest
    )
    with pytest.raises(HymbaError, match="choose an output of its own"):
        prepare(config(tmp_path), str(tmp_path))


def tokenize(corpus, output, fraction, *options):
    options = ("--data.path", corpus, "--data.validation-fraction", fraction, *options)
    options += ("--tokenizer", "bytes", "--output", output)
    cli.main(["tokenize", *map(str, options)])
    return output


def test_text_with_a_manifest_of_its_own_is_text(tmp_path, output):
    (tmp_path / "pages").mkdir()
    for name in ("manifest.json", "data.json"):
        (tmp_path / "pages" / name).write_text(json.dumps([{"text": text} for text in TEXTS]))
    data = config(tmp_path / "pages")
    assert source_formats(data, output).train == {"corpus": "text"}
    assert len(documents(prepare(data, output).train["corpus"])) > len(TEXTS)


@pytest.fixture
def tokenized(corpus, tmp_path):
    return tokenize(corpus, tmp_path / "tokenized", 0.2)


def test_a_tokenized_corpus_is_opened_as_it_is(tokenized, output):
    sources = prepare(config(tokenized, tokenizer="bpe:4096"), output)
    found = [*documents(sources.train["corpus"]), *documents(sources.validation["corpus"])]
    expected = [[1, *sources.tokenizer.encode(text), 2] for text in TEXTS]
    assert sorted(found) == sorted(expected)
    assert sources.notes == (
        f"{tokenized}: is tokenized: its tokenizer and validation documents are used",
        "data.validation_fraction: has no effect on these sources",
    )
    with pytest.raises(HymbaError, match="was tokenized by another tokenizer than the run's"):
        prepare(config(tokenized), output, build_tokenizer("bpe:270", ["a b a b"]))


def test_text_beside_tokens_is_tokenized_as_they_were(corpus, tokenized, output):
    sources = {
        "tokens": WeightedSourceConfig(str(tokenized)),
        "text": WeightedSourceConfig(str(corpus)),
        "unused": WeightedSourceConfig("/nowhere", weight=0.0),
    }
    data = config(tokenizer="bpe:4096", sources=sources)
    opened = prepare(data, output)
    assert documents(opened.train["text"]) == documents(opened.train["tokens"])
    notes = open_data(data, None, output).notes
    assert "data.sources.unused: is not read, as its weight is 0 wherever a stage names it" in notes


@pytest.mark.parametrize("kind", ["megatron", "bin", "npy"])
def test_tokens_that_others_wrote(tmp_path, output, kind):
    tokenizer = build_tokenizer("bytes", [])
    tokenizer.save(tmp_path / "tokenizer")
    streams = [[1, *tokenizer.encode(text), 2] for text in TEXTS]
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        flat = np.concatenate(streams[number::2]).astype(np.uint16)
        if kind == "megatron":
            with MegatronWriter(shards / f"{number}", 259) as writer:
                for stream in streams[number::2]:
                    writer.write([np.array(stream)])
        elif kind == "bin":
            flat.tofile(shards / f"{number}.bin")
        else:
            np.save(shards / f"{number}.npy", flat)
    dtype = "uint16" if kind == "bin" else ""
    held_out = SourceConfig(str(shards / f"1{'.npy' if kind == 'npy' else '.bin'}"), "", dtype)
    data = config(
        tokenizer=str(tmp_path / "tokenizer"),
        sources={"web": WeightedSourceConfig(str(shards), token_dtype=dtype)},
        validation={"some": held_out},
        validation_packing="documents",
    )
    with pytest.raises(HymbaError, match=r"is data\.sources\.web, too, which is trained on"):
        prepare(data, output)
    copy = shutil.copytree(shards, tmp_path / "copy")
    held_out = dataclasses.replace(held_out, path=held_out.path.replace(str(shards), str(copy)))
    data = dataclasses.replace(data, validation={"some": held_out})
    opened = prepare(data, output)
    assert documents(opened.train["web"]) == streams[::2] + streams[1::2]
    validation = open_data(data, None, output).validation_sets(data)["some"]
    assert validation.text_bytes == sum(len(text.encode()) for text in TEXTS[1::2])
    assert validation.rows.num_targets == sum(len(stream) - 1 for stream in streams[1::2])


def test_the_digest_of_tokens_that_others_wrote_tells_documents_apart(tmp_path):
    files = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for file, end in zip(files, (2, 5), strict=True):
        with MegatronWriter(file, 9) as writer:
            for document in np.split(np.arange(9), [end]):
                writer.write([document])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert digest_of(files[:1]) != digest_of(files[1:])


@pytest.mark.parametrize("is_tokenized", [False, True])
def test_packed_documents_come_once_an_epoch(corpus, tokenized, output, is_tokenized):
    """Each piece in a segment of its own, and every token but a document's first a target."""
    path = tokenized if is_tokenized else corpus
    data = config(path, sequence_length=32, packing="documents")
    prepare(data, output)
    examples = train_examples(data, output)
    per_epoch = round(1 / examples.progress(1)["epoch"])
    found = Counter()
    for batch in islice(train_batches(examples, 1), per_epoch):
        inputs, targets, segments = (field[0] for field in batch[:3])
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            assert (targets[own] != IGNORED_TARGET).all()
            np.testing.assert_array_equal(inputs[own][1:], targets[own][:-1])
            found.update(targets[own].tolist())
        assert (targets[segments == 0] == IGNORED_TARGET).all()
    streams = documents(open_sources(data, None, output).train["corpus"])
    assert found == Counter(token for stream in streams for token in stream[1:])


def test_stages_go_on_where_the_one_before_stopped(corpus, output):
    """An epoch is read once, whatever the stages it is in, until rows have another length."""
    sources = {name: WeightedSourceConfig(str(corpus)) for name in ("a", "b")}
    both = config(sources=sources)
    only_b = dataclasses.replace(
        both, sources={**sources, "a": WeightedSourceConfig(str(corpus), weight=0.0)}
    )
    longer = dataclasses.replace(both, sequence_length=32)
    prepare(both, output)
    lengths = (10, 7, 30, 20)
    stages = list(zip((both, only_b, both, longer), lengths, strict=True))
    examples = open_data(both, None, output).train_examples(stages, seed=0)
    origins = [
        [stage.origin(index) for index in range(length)]
        for stage, length in zip(examples, lengths, strict=True)
    ]
    assert {origin.source for origin in origins[1]} == {"b"}
    same_length = [origin for stage in origins[:3] for origin in stage if origin.source == "b"]
    assert len(same_length) == 5 + 7 + 15
    first_epoch = [origin.row for origin in same_length if origin.epoch == 0]
    assert len(set(first_epoch)) == len(first_epoch) > 12
    assert examples[2].progress(30)["sequences/b"] == 27
    assert examples[1].progress(7)["sequences/a"] == 5
    assert examples[3].progress(20)["sequences/b"] == 27 + 10
    (alone,) = open_data(both, None, output).train_examples([(longer, 0)], seed=0)
    assert [alone.origin(index) for index in range(20)] != origins[3]


def test_too_little_text(corpus, output):
    data = config(corpus, sequence_length=100_000)
    prepare(data, output)
    with pytest.raises(HymbaError) as caught:
        train_examples(data, output)
    for part in (str(corpus), "too little text", "takes 100001", "shorten sequence_length"):
        assert part in str(caught.value)


def test_each_problem_is_one_line(corpus, tokenized, tmp_path, output):
    foreign = tmp_path / "foreign.npy"
    np.save(foreign, np.array([1, 500, 2] * 20, np.uint16))
    flat = tmp_path / "flat.bin"
    np.array([1, 5, 2] * 20, np.uint16).tofile(flat)
    whole = tokenize(corpus, tmp_path / "whole", 0)
    for data, message in (
        (config(tmp_path / "missing"), "missing: no such file or directory"),
        (config(whole), "whole: no validation documents: name some in"),
        (config(foreign, tokenizer="bpe:300"), "does not say what made its tokens"),
        (config(foreign), "foreign.npy: no validation documents"),
        (config(flat), "flat.bin: no dtype is given"),
    ):
        with pytest.raises(HymbaError, match=message) as caught:
            prepare(data, output)
        assert "\n" not in str(caught.value)
    data = config(foreign, validation={"some": SourceConfig(str(corpus))})
    prepare(data, output)
    with pytest.raises(HymbaError, match=r"foreign\.npy: has token 500 among"):
        next(train_batches(train_examples(data, output), 2))


def test_a_named_tokenizer_is_that_of_the_tokens(corpus, tokenized, tmp_path, output):
    build_tokenizer("bpe:270", ["a b a b"]).save(tmp_path / "other")
    with pytest.raises(HymbaError, match=r"by another tokenizer than data\.tokenizer .*other: tok"):
        prepare(config(tokenized, tokenizer=str(tmp_path / "other")), output)
    same = prepare(config(tokenized, tokenizer="bytes"), output)
    assert same.tokenizer.vocab_size == 259


def test_a_tokenized_corpus_for_validation_is_used_whole(corpus, tokenized, tmp_path, output):
    other = tmp_path / "other.txt"
    other.write_text("another text")
    for path in (tokenized, tokenize(corpus, tmp_path / "whole", 0)):
        opened = prepare(config(other, validation={"v": SourceConfig(str(path))}), output)
        validation = opened.validation["v"]
        assert len(documents(validation)) == len(TEXTS)
        assert validation.text_bytes == sum(len(text.encode()) for text in TEXTS)
        assert any("not searched for documents of data.validation.v" in n for n in opened.notes)
    with pytest.raises(HymbaError, match=r"tokenized: is data\.path, too, which is trained on"):
        prepare(config(tokenized, validation={"v": SourceConfig(str(tokenized))}), output)


def test_tokenized_with_different_shares_is_said(corpus, tokenized, tmp_path, output):
    half = tokenize(corpus, tmp_path / "half", 0.5)
    for other, is_said in ((half, True), (tokenize(corpus, tmp_path / "same", 0.2), False)):
        sources = {"a": WeightedSourceConfig(str(tokenized)), "b": WeightedSourceConfig(str(other))}
        notes = prepare(config(sources=sources, tokenizer="bpe:4096"), output).notes
        assert any("hold out different shares" in note for note in notes) == is_said
    validation = {"v": SourceConfig("mqar:2:8")}  # with which nothing of them is validated
    sources["b"] = WeightedSourceConfig(str(half))
    about = config(
        sources=sources,
        tokenizer="bpe:4096",
        validation=validation,
        validation_packing="documents",
    )
    assert not any("different shares" in note for note in prepare(about, output).notes)


def test_a_document_that_is_cut_in_two_is_in_no_other_source(tmp_path, output):
    """Nor is one that a small corpus has on another side than its hash says."""
    one = "".join(f"line {number}\n" for number in range(50))
    (tmp_path / "one.txt").write_text(one)
    lines = [json.dumps({"text": text}) for text in [*TEXTS, one]]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    sources = {
        name: WeightedSourceConfig(str(tmp_path / file))
        for name, file in (("one", "one.txt"), ("many", "many.jsonl"))
    }
    opened = prepare(config(sources=sources), output)
    decode = opened.tokenizer.decode
    many = [opened.train["many"], opened.validation["many"]]
    assert {decode(ids) for side in many for ids in documents(side)} == set(TEXTS)
    head, tail = (decode(documents(side["one"])[0]) for side in (opened.train, opened.validation))
    assert head + tail == one


def test_on_resume_a_source_is_the_same_text(corpus, tmp_path, output):
    """Where a checkpoint depends on its tokens; else they are made again."""
    first = prepare(config(corpus), output)
    digest = first.train["corpus"].digest
    used = {"training source corpus": digest}
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text() + "\n" + json.dumps({"text": "one more"}))
    with pytest.raises(HymbaError, match=r"other\.jsonl is not .*corpus\.jsonl, on whose tokens"):
        prepare(config(other), output, first.tokenizer, used)
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(corpus, tmp_path / "moved")
    assert prepare(config(moved), output, first.tokenizer, used).train["corpus"].digest == digest
    again = prepare(config(other), output, first.tokenizer, {"training source x": digest})
    assert again.train["corpus"].digest != digest


def test_tokens_of_a_refused_resume_do_not_stay(corpus, tmp_path, output):
    first = prepare(config(corpus), output)
    digest = first.train["corpus"].digest
    used = {"training source corpus": digest}
    shutil.rmtree(f"{output}/tokens")
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text() + "\n" + json.dumps({"text": "one more"}))
    with pytest.raises(HymbaError, match="source corpus has other tokens than those the run was"):
        prepare(config(other), output, first.tokenizer, used)
    assert prepare(config(corpus), output, first.tokenizer, used).train["corpus"].digest == digest


def test_text_that_was_edited_at_the_same_size_is_tokenized_again(corpus, output):
    first = prepare(config(corpus), output)
    before = corpus.stat()
    corpus.write_text(corpus.read_text().replace("document 7", "Document 7"))
    os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert corpus.stat().st_size == before.st_size
    second = prepare(config(corpus), output)
    assert second.train["corpus"].digest != first.train["corpus"].digest


def test_tokens_are_refused_before_text_is_tokenized(corpus, tmp_path, output):
    broken = tmp_path / "broken.bin"
    broken.write_bytes(b"123")
    sources = {
        "text": WeightedSourceConfig(str(corpus)),
        "broken": WeightedSourceConfig(str(broken), token_dtype="uint16"),
    }
    with pytest.raises(HymbaError, match="are no whole number of uint16 tokens"):
        prepare(config(sources=sources), output)
    assert not (tmp_path / "run").exists()


def test_options_without_effect_are_refused(corpus, tokenized, tmp_path, output):
    npy = tmp_path / "tokens.npy"
    np.save(npy, np.array([1, 5, 2] * 20, np.uint16))
    for path, options, message in (
        (corpus, {"token_dtype": "uint16"}, "token_dtype has no effect: .* is no flat"),
        (npy, {"token_dtype": "uint16"}, "token_dtype has no effect: .* is no flat"),
        (tokenized, {"text_field": "body"}, "text_field has no effect: .* is tokenized already"),
    ):
        sources = {"a": WeightedSourceConfig(str(path), **options)}
        with pytest.raises(HymbaError, match=message):
            prepare(config(sources=sources), output)
