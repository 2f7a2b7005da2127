import jax
import numpy as np

from hymba_jax.data.batch import IGNORED_TARGET, abstract_batch, make_row, stack_rows


def test_a_row_predicts_every_token_but_the_first_and_pads_the_rest():
    row = make_row(np.array([7, 8, 9], np.uint16), 4)
    assert row.inputs.tolist() == [7, 8, 0, 0]
    assert row.targets.tolist() == [8, 9, IGNORED_TARGET, IGNORED_TARGET]
    for tokens in ([], [7]):  # nothing to predict
        row = make_row(np.array(tokens, np.uint16), 4)
        assert row.inputs.tolist() == [0] * 4
        assert row.targets.tolist() == [IGNORED_TARGET] * 4


def test_a_batch_is_what_its_abstract_one_says():
    rows = [make_row(np.arange(start, start + 6, dtype=np.uint32), 5) for start in range(3)]
    batch = stack_rows(rows)
    assert batch.inputs[:, 0].tolist() == [0, 1, 2]
    abstract = abstract_batch(3, 5)
    assert jax.tree.structure(batch) == jax.tree.structure(abstract)
    for array, like in zip(jax.tree.leaves(batch), jax.tree.leaves(abstract), strict=True):
        assert (array.shape, array.dtype) == (like.shape, like.dtype)
