"""`benchmarks/needle.py`: what it keeps, by steps."""

import json
from pathlib import Path

import numpy as np
import pytest
from inference.models import byte_tokenizer, make_model

from hymba_jax.checkpoint.save import save_model
from hymba_jax.evaluation.needle import NeedleReport

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def needle(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import needle

    return needle


def test_runs_of_other_steps_have_other_documents(needle, monkeypatch, tmp_path):
    """And the picture is beside them."""
    model, tokenizer, runs = make_model(layers="W-"), byte_tokenizer(), []

    def train(run):
        runs.append(run)
        save_model(Path(run.output), model, tokenizer)

    zeros = np.zeros((1, 2))
    report = NeedleReport({}, (64,), (0.0, 1.0), zeros, zeros, zeros[:, 0])
    monkeypatch.setattr(needle, "train", train)
    monkeypatch.setattr(needle, "prepare_host", lambda: None)
    monkeypatch.setattr(needle, "corpus_tokens", lambda *_: [tokenizer.encode("text " * 99)])
    monkeypatch.setattr(needle, "LanguageModel", lambda *_, **options: None)
    monkeypatch.setattr(needle, "find_needles", lambda *_: report)
    save_model(tmp_path / "model", model, tokenizer)
    for steps in (2, 3):
        needle.main(
            needle.Args(
                model=str(tmp_path / "model"), output=tmp_path / "out", steps=steps, lengths=(64,)
            )
        )
    assert len({run.output for run in runs}) == 2
    for run, steps in zip(runs, (2, 3), strict=True):
        lines = Path(run.data.path).read_text().splitlines()
        assert len(lines) == 8 * steps
        assert all(json.loads(line)["text"].count("The magic number is") == 4 for line in lines)
    assert (tmp_path / "out/needle.png").stat().st_size > 10_000
