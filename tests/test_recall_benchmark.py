"""`benchmarks/recall.py`: equal designs, and cells that are trained once."""

import json
from pathlib import Path

import pytest

from hymba_jax.convert.inspect import count_by_part

SIZES = [f"1 in {length}" for length in (8, 16, 32, 64, 128)]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def recall(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import recall

    return recall


def test_designs_have_equally_many_parameters(recall):
    from _recall_training import VOCAB_SIZE, config_of

    embeddings = 2 * 192 * VOCAB_SIZE  # not tied
    for cell in recall.cells(recall.Args(tasks=("mqar",), seeds=(0,))):
        count = count_by_part(config_of(cell, VOCAB_SIZE)).total()
        assert count == pytest.approx(1_000_000 + embeddings, rel=0.005)


def test_finished_cells_are_not_trained_again(recall, monkeypatch, tmp_path, capsys):
    """The second start trains what the first one did not; tables are of all seeds."""
    trained = []

    def train_all(cells, directory, processes):
        for cell in cells:
            if len(trained) == 5:
                raise KeyboardInterrupt
            trained.append(cell)
            yield cell, {"scores": dict.fromkeys(SIZES, 0.25 + cell.seed / 2), "parameters": 1}

    monkeypatch.setattr(recall, "train_all", train_all)
    args = recall.Args(
        tasks=("induction",),
        designs=("mamba", "llama", "hymba"),
        seeds=(0, 1),
        output=tmp_path,
        picture=tmp_path / "recall.png",
    )
    with pytest.raises(KeyboardInterrupt):
        recall.main(args)
    stopped = trained.copy()
    trained.clear()
    recall.main(args)
    assert [(cell.design, cell.seed) for cell in stopped + trained] == [
        (design, seed) for seed in args.seeds for design in args.designs
    ]
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert [json.loads(line)["cell"]["seed"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert capsys.readouterr().out.rstrip().splitlines()[-5:] == [
        f"| induction | {' | '.join(SIZES)} |",
        "|---|" + "---:|" * len(SIZES),
        *(f"| {d} |" + " 0.50 (0.25 to 0.75) |" * len(SIZES) for d in ("mamba", "llama", "hymba")),
    ]
    assert (tmp_path / "recall.png").stat().st_size > 10_000


@pytest.mark.slow
def test_attention_learns_to_recall(recall, tmp_path):
    """Values found by their keys; without keys, the best is one in 8 of a row's values."""
    args = recall.Args(tasks=("mqar",), designs=("llama",), seeds=(0,))
    ((_, result),) = recall.train_all([*recall.cells(args)], tmp_path, processes=1)
    assert result["scores"]["8 in 32"] > 0.9
