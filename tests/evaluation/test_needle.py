"""Needles in haystacks: where they stand, and their scores against the full forward pass."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from inference.models import byte_tokenizer, make_model

from hymba_jax import cli
from hymba_jax.checkpoint.save import save_model
from hymba_jax.errors import HymbaError
from hymba_jax.evaluation.needle import NeedleConfig, make_trials
from hymba_jax.tokenizer import Tokenizer

PHRASE = "key"
HAY = "abcdefghijklmnopqrstuvwxyz" * 20
CONFIG = NeedleConfig(lengths=(60, 90), depths=3, trials=2, phrase=PHRASE)


def trials(config=CONFIG, hay=HAY, tokenizer=None, seed=0):
    tokenizer = tokenizer or byte_tokenizer()
    return [*make_trials(tokenizer, [tokenizer.encode(hay)], config, seed, 512)]


def test_where_the_needle_is():
    """Bytes are tokens, behind one that begins the sequence."""
    made, tokenizer = trials(), byte_tokenizer()
    assert len(made) == 2 * 2 * (3 + 1)
    haystacks = {}
    for i, ((row, column), tokens, answer) in enumerate(made):
        assert len(tokens) == CONFIG.lengths[row] + 1
        assert tokens[0] == tokenizer.bos_id
        text = tokenizer.decode(tokens[1:])
        number = text[-5:]
        assert answer == 6
        assert number.isdecimal()
        needle, question = f"\nkey {number}.\n", f"\nkey {number}"
        body = text.removesuffix(question)
        assert body.count(needle) == (column < 3)
        if column < 3:
            room = len(body) - len(needle)
            assert body.index(needle) == [0, round(room / 2), room][column]
        text = body.replace(needle, "")
        assert text in HAY
        assert haystacks.setdefault(i // 4, text).startswith(text[:20])  # the same of a trial
    assert len({*haystacks.values()}) == 4


def test_lines_are_encoded_whole():
    """A tokenizer as SentencePiece's, of characters, begins what it is given with a space; one of
    its tokens reaches over the end of the phrase, and one over the end of the line."""
    characters = ["▁", *HAY[:26], *"0123456789.\n"]
    merges = [("y", "▁"), (".", "\n")]
    names = ["<s>", "</s>", *characters, *map("".join, merges)]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    model.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    for (_, column), tokens, answer in trials(tokenizer=Tokenizer(model, "<s>", "</s>")):
        pieces = [names[token] for token in tokens]
        number = "".join(pieces[-5:])
        assert pieces[-9:-5] == ["\n", "k", "e", "y▁"]
        assert answer == 6
        needle = ["▁", "\n", "k", "e", "y▁", *number, ".\n"]
        places = [i for i in range(len(pieces)) if pieces[i : i + len(needle)] == needle]
        assert len(places) == (column < 3)


def test_prompts_of_a_length_do_not_depend_on_the_others():
    def of(*lengths, **changes):
        made = trials(dataclasses.replace(CONFIG, lengths=lengths), **changes)
        return {
            length: [tokens for (row, _), tokens, _ in made if row == i]
            for i, length in enumerate(lengths)
        }

    assert of(60, 90) == of(90, 60) == of(60) | of(90)
    assert of(60) != of(60, seed=1)


def test_a_length_beyond_the_context_is_refused_before_the_haystack_is_read():
    def haystack():
        pytest.fail("read")
        yield

    with pytest.raises(HymbaError, match="has 90 tokens, the model's context is 89: give"):
        next(iter(make_trials(byte_tokenizer(), haystack(), CONFIG, 0, 89)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": NeedleConfig(lengths=(20,))}, "needle.lengths has 20, too short for needle"),
        ({"hay": HAY[:70]}, r"the haystack has 70 tokens, a text of 90 takes 80: give a longer"),
    ],
)
def test_what_is_impossible(changes, message):
    with pytest.raises(HymbaError, match=message):
        trials(**changes)


def test_the_command_scores_as_the_full_forward_pass(tmp_path):
    model = make_model(layers="W-")  # without an MLP: it compiles faster
    save_model(tmp_path / "model", model, byte_tokenizer())
    (tmp_path / "hay.txt").write_text(HAY)
    output, image = tmp_path / "out.json", tmp_path / "out.png"
    command = f"evaluate --model {tmp_path / 'model'} --data.path {tmp_path / 'hay.txt'}"
    command += (
        f" --needle.lengths 60 90 --needle.depths 3 --needle.trials 2 --needle.phrase {PHRASE}"
    )
    cli.main(f"{command} --output {output} --image {image}".split())
    forward = jax.jit(lambda tokens: model(tokens))
    nats, found = np.zeros((2, 4)), np.zeros((2, 4))
    for cell, tokens, answer in trials():
        padded = np.zeros((1, 96), np.int32)  # causal: what is behind a token does not matter
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(jnp.asarray(padded)), np.float64)[0]
        logits = logits[len(tokens) - 1 - answer : len(tokens) - 1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        target = tokens[-answer:]
        nats[cell] -= log_probs[range(answer), target].mean() / 2
        found[cell] += np.mean([*logits.argmax(-1)] == [*target]) / 2
    result = json.loads(output.read_text())
    assert (result["lengths"], result["depths"]) == ([60, 90], [0, 0.5, 1])
    # Logits in float32, in batches of other shapes.
    np.testing.assert_allclose(result["nats_per_token"], nats[:, :-1], atol=1e-4)
    np.testing.assert_allclose(result["nats_per_token_without_needle"], nats[:, -1], atol=1e-4)
    assert result["accuracy"] == found[:, :-1].tolist()
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--needle.lengths 64 --tasks piqa", "give either data.path"),
        ("--needle.lengths 64 --window 8", "window has no effect on needles"),
        ("--data.path x --needle.depths 3", "needle has no effect without needle.lengths"),
        ("--needle.lengths 64 --needle.depths 1", "depths is 1, below 2"),
        ("--needle.lengths 64 --data.format chat", "data.format has no effect on needles"),
    ],
)
def test_options_without_effect(options, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["evaluate", "--model", "x", *options.split()])
