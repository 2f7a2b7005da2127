"""Records of a chosen and a rejected answer, as pairs of conversations."""

import shutil

import pytest
from data.chat import TEMPLATE, chat_tokenizer, write_lines

from hymba_jax import cli
from hymba_jax.config.data import DataConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.data import tokenize_records
from hymba_jax.data.preferences import Preferences
from hymba_jax.data.show_examples import BRACKETS
from hymba_jax.data.tokenized import TokenizedCorpus
from hymba_jax.errors import HymbaError


def message(role, content):
    return {"role": role, "content": content}


def user(content):
    return message("user", content)


def assistant(content):
    return message("assistant", content)


def rendered(value, loss_on="all", template=TEMPLATE):
    """The text of each side, with what the loss is on in brackets."""
    pair = Preferences(chat_tokenizer(template), loss_on, "chat.jinja").of_json(value)
    texts = []
    for side in pair:
        text = side.text
        for start, stop in reversed(side.answers):
            text = f"{text[:start]}[{text[start:stop]}]{text[stop:]}"
        texts.append(text)
    return texts


SHORT = ["u>Q</s>a>[A</s>]", "u>Q</s>a>[B</s>]"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, SHORT),
        ({"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": "B"}, SHORT),
        ({"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}, SHORT),
        (
            {
                "prompt": "Q",
                "chosen": [user("Q"), assistant("A")],
                "rejected": [user("Q"), assistant("B")],
            },
            SHORT,
        ),
        (
            {"system": "S", "prompt": "Q", "chosen": "A", "rejected": "B"},
            [f"s>S</s>{side}" for side in SHORT],
        ),
        (  # what the sides share is the prompt: its answers are in no loss
            {
                "chosen": [user("P"), assistant("R"), user("Q"), assistant("A")],
                "rejected": [user("P"), assistant("R"), user("Q"), assistant("B")],
            },
            [f"u>P</s>a>R</s>{side}" for side in SHORT],
        ),
        (
            {
                "prompt": "Q",
                "chosen": [assistant("A"), user("more"), assistant("A2")],
                "rejected": "B",
            },
            ["u>Q</s>a>[A</s>]u>more</s>a>[A2</s>]", SHORT[1]],
        ),
        (  # one side is how the other begins
            {
                "chosen": [user("Q"), assistant("A")],
                "rejected": [user("Q"), assistant("A"), user("more"), assistant("B")],
            },
            [SHORT[0], "u>Q</s>a>[A</s>]u>more</s>a>[B</s>]"],
        ),
    ],
)
def test_forms(value, expected):
    assert rendered(value) == expected


def test_the_last_answer_alone_and_templates_that_mark_answers():
    sides = {"prompt": [user("P"), assistant("R"), user("Q")], "rejected": "B"}
    value = sides | {"chosen": [assistant("A"), user("more"), assistant("A2")]}
    begins = "u>P</s>a>R</s>"
    expected = [f"{begins}u>Q</s>a>A</s>u>more</s>a>[A2</s>]", begins + SHORT[1]]
    assert rendered(value, "last") == expected
    marked = (
        "{% for m in messages %}{{ m.role[0] }}>{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    assert rendered(value, "last", marked) == expected
    assert rendered(value, "all", marked) == rendered(value)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "not a JSON object"),
        ({"prompt": "Q", "chosen": "A"}, r'no "chosen" and "rejected" \(it has: .prompt., .cho'),
        ({"chosen": "A", "rejected": "B"}, "'chosen' is text, and there is no 'prompt': add it"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen and rejected are equal"),
        ({"prompt": "Q", "chosen": " ", "rejected": "A"}, "chosen: message 2 is an empty answer"),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "rejected: message 2 is an empty answer"),
        ({"prompt": "Q", "chosen": 3, "rejected": "A"}, "'chosen' is not a list of messages"),
        ({"prompt": "Q", "chosen": [3], "rejected": "A"}, "'chosen' begins with another prompt"),
        ({"prompt": "", "chosen": "A", "rejected": "B"}, "chosen: message 1 is empty"),
        (
            {"chosen": [user("P"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
            "the prompts of chosen and rejected differ, in message 1, of 'user'",
        ),
        (
            {"prompt": "P", "chosen": [user("Q"), assistant("A")], "rejected": "B"},
            "'chosen' begins with another prompt than 'prompt'",
        ),
        (
            {"prompt": "Q", "chosen": "A", "rejected": [assistant("B"), user("C")]},
            "rejected: the last message is of 'user', not an answer",
        ),
    ],
)
def test_what_is_no_pair(value, problem):
    with pytest.raises(ValueError, match=f"^{problem}"):
        rendered(value)


PAIRS = [{"prompt": f"Q{n}", "chosen": "é" * (n % 4 + 1), "rejected": f"B{n}"} for n in range(30)]


@pytest.fixture
def tokenize(tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)

    def run(records, *options):
        write_lines(tmp_path / "pairs.jsonl", records)
        command = ["--data.path", tmp_path / "pairs.jsonl", "--data.format", "preference"]
        command += ["--tokenizer", "bytes", "--chat-template", tmp_path / "chat.jinja"]
        command += ["--output", tmp_path / "out", *options]
        cli.main(["tokenize", *map(str, command)])
        return TokenizedCorpus.open(tmp_path / "out")

    return run


def test_both_sides_of_a_pair_are_written_behind_one_another(tokenize, monkeypatch):
    """Also where a shard ends, and on the same side of the split."""
    monkeypatch.setattr(tokenize_records, "SHARD_TOKENS", 90)
    corpus = tokenize(PAIRS, "--data.validation-fraction", "0.3")
    assert corpus.format == "preference"
    tokenizer, found = corpus.tokenizer, []
    for store, manifest in ((corpus.train, corpus.manifest.train),
                            (corpus.validation, corpus.manifest.validation)):  # fmt: skip
        assert all(shard.documents % 2 == 0 for shard in manifest.shards)
        starts = store.document_starts(0, store.num_tokens).tolist()
        texts = [
            tokenizer.model.decode(store.read(start, stop).tolist(), skip_special_tokens=False)
            for start, stop in zip(starts, [*starts[1:], store.num_tokens], strict=True)
        ]
        found += zip(texts[::2], texts[1::2], strict=True)
    assert len(corpus.manifest.train.shards) > 3
    expected = [
        (f"u>{each['prompt']}</s>a>{each['chosen']}</s>",
         f"u>{each['prompt']}</s>a>{each['rejected']}</s>") for each in PAIRS
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)


def test_both_sides_are_shown(tokenize, capsys):
    tokenize(PAIRS, "--data.validation-fraction", "0", "--show", "1")
    on, off = BRACKETS
    shown = capsys.readouterr().out.partition("---")[2]
    assert shown == (
        f" train 1 chosen: 10 tokens, the loss is on 3\nu>Q0</s>a>{on}é</s>{off}\n"
        f"--- train 1 rejected: 10 tokens, the loss is on 3\nu>Q0</s>a>{on}B0</s>{off}\n"
    )


def test_bad_pairs_are_named_or_counted(tokenize, tmp_path):
    bad = {"prompt": "Q", "chosen": "A", "rejected": "A"}
    with pytest.raises(SystemExit, match=r"pairs.jsonl:2: chosen and rejected are equal"):
        tokenize([PAIRS[0], bad, PAIRS[1]])
    shutil.rmtree(tmp_path / "out")
    corpus = tokenize([PAIRS[0], bad, PAIRS[1]], "--data.on-bad-record", "skip")
    assert corpus.manifest.skipped == 1


def test_pairs_are_isolated_documents():
    with pytest.raises(HymbaError, match=r"isolated documents: set data\.packing"):
        RunConfig(data=DataConfig(path="a", format="preference"))
