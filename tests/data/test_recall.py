"""Generated tasks of recall, answered from their inputs alone."""

import numpy as np
import pytest

from hymba_jax.data.batch import IGNORED_TARGET
from hymba_jax.data.recall import RecallTask, mixed_batch
from hymba_jax.errors import HymbaError

TASKS = [
    RecallTask("mqar", 40, pairs=7, vocab_size=20),
    RecallTask("mqar", 9, pairs=3, vocab_size=8),
    RecallTask("selective_copying", 30, pairs=6),
    RecallTask("selective_copying", 4, pairs=2, vocab_size=4),
    RecallTask("induction", 25),
    RecallTask("induction", 3),
]


def answers(task, inputs):
    """Place -> answer, read out of the inputs."""
    marks = np.flatnonzero(inputs == 1)
    if task.name == "induction":
        return {len(inputs) - 1: inputs[marks[0] + 1]}
    if task.name == "selective_copying":
        return dict(zip(marks, inputs[inputs > 1], strict=True))
    shown = inputs[: 2 * task.pairs]
    values = dict(zip(shown[::2], shown[1::2], strict=True))
    later = np.arange(2 * task.pairs, task.length)
    return {place: values[inputs[place]] for place in later if inputs[place]}


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_targets_are_the_answers_and_nothing_else(task):
    for index in range(50):
        inputs, targets = task.row(0, index)[:2]
        places = np.flatnonzero(targets != IGNORED_TARGET)
        assert len(places) == (1 if task.name == "induction" else task.pairs)
        assert dict(zip(places, targets[places], strict=True)) == answers(task, inputs)
        assert inputs.min() >= 0
        assert inputs.max() < task.vocab_size


@pytest.mark.parametrize("task", TASKS[::2], ids=str)
def test_a_row_depends_on_seed_and_index_alone(task):
    first, again = (mixed_batch([task], 3, 2, batch_size=4, length=task.length) for _ in range(2))
    np.testing.assert_array_equal(first.inputs[1], task.row(3, 9).inputs)
    np.testing.assert_array_equal(first.targets, again.targets)
    rows = [task.row(seed, index).inputs.tobytes() for seed in (3, 4) for index in range(20)]
    assert len(set(rows)) == 40


def test_queries_are_at_all_places():
    """Of 200 rows, each of the 26 places behind the pairs has some."""
    task = TASKS[0]
    seen = sum(task.row(0, index).targets != IGNORED_TARGET for index in range(200))
    assert (seen[14:] > 20).all()
    assert not seen[:14].any()


def test_sizes_take_turns_in_packed_rows():
    """Each row is documents of one size, all different, in this step and the next."""
    short, long = RecallTask("mqar", 8, pairs=2), RecallTask("mqar", 16, pairs=3)
    seen = []
    for step in range(2):
        batch = mixed_batch([short, long], 0, step, batch_size=3, length=16)
        for i, row in enumerate(zip(*batch[:3], strict=True)):
            task = (short, long)[(3 * step + i) % 2]
            inputs, targets, segment_ids = (field.reshape(-1, task.length) for field in row)
            np.testing.assert_array_equal(segment_ids, 1 + np.indices(inputs.shape)[0])
            for document, its_targets in zip(inputs, targets, strict=True):
                places = np.flatnonzero(its_targets != IGNORED_TARGET)
                assert dict(zip(places, its_targets[places], strict=True)) == answers(
                    task, document
                )
                seen.append(document.tobytes())
    assert len(set(seen)) == len(seen) == 3 * 2 + 3


def test_rows_that_do_not_fill_a_packed_one():
    with pytest.raises(HymbaError, match="mqar: rows of 8 tokens do not fill a sequence of 20"):
        RecallTask("mqar", 8, pairs=2).packed_row(0, 0, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mqar", 20, 7), "mqar: 7 pairs take 21 tokens, length is 20"),
        (("mqar", 40, 8, 16), "mqar: 8 pairs take as many keys, a vocab_size of 16 has 7"),
        (("induction", 2), "induction: 1 pairs take 3 tokens"),
        (("induction", 8, 2), "induction: has one pair, not 2: set 1"),
    ],
)
def test_impossible_sizes(arguments, message):
    with pytest.raises(HymbaError, match=message):
        RecallTask(*arguments)
