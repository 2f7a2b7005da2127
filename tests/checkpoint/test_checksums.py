"""Checksums of values: the same for every sharding, and another for any damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hymba_jax.checkpoint.checksums import check_tree, checksums_metadata, tree_checksums
from hymba_jax.errors import HymbaError


def in_whole_numbers(bits):
    """The sum that the module's docstring describes, without arrays; lowbias32 by its author's C.

    https://nullprogram.com/blog/2018/07/31/
    """
    total = 0
    for i, word in enumerate(bits):
        x = word ^ (i * 0x9E3779B1) % 2**32
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        x ^= x >> 16
        total += x
    return total % 2**32


def random_bits(dtype, *shape):
    size = np.dtype(dtype).itemsize
    return np.random.default_rng(0).integers(0, 256, (*shape, size), np.uint8).view(dtype)[..., 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8"])
def test_values_are_those_of_the_definition(dtype):
    array = random_bits(jnp.dtype(dtype), 3, 5, 7)
    bits = array.reshape(-1).view(f"u{array.itemsize}").tolist()
    assert tree_checksums({"a": array}) == {"a": in_whole_numbers(bits)}


@pytest.mark.parametrize(
    "spec", [(), ("x",), (None, ("x", "y")), ("y", None, "x")], ids=["whole", "x", "xy", "y-x"]
)
def test_sharding_does_not_change_them(spec):
    mesh = jax.make_mesh((2, 4), ("x", "y"), devices=jax.devices())
    array = random_bits(jnp.bfloat16, 4, 8, 6)
    sharded = jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))
    assert tree_checksums([sharded]) == tree_checksums([array])


def test_arrays_of_several_chunks_are_one_sum():
    array = random_bits(np.float32, (1 << 20) + 3)
    two = jax.device_put(array.reshape(-1, 1), jax.NamedSharding(jax.make_mesh((1,), "x"), jax.P()))
    sharded = jax.device_put(array, jax.devices()[1])
    assert tree_checksums([array, sharded, two]).keys() == {"0", "1", "2"}
    assert len(set(tree_checksums([array, sharded, two]).values())) == 1
    other = array.copy()
    other[-1] = np.nextafter(other[-1], np.float32(0))
    assert tree_checksums([other]) != tree_checksums([array])


def test_edges():
    assert tree_checksums({"none": np.zeros((0, 3), np.float32)}) == {"none": 0}
    zeros = tree_checksums([np.zeros(n, np.float32) for n in (1, 2, 3)])
    assert len(set(zeros.values())) == 3
    assert tree_checksums({"scalar": jnp.int32(7)}) == {"scalar": in_whole_numbers([7])}


@pytest.mark.parametrize("dtype", [np.uint32, np.uint16])
def test_any_flipped_bit_is_found(dtype):
    array = random_bits(dtype, 5)
    before = tree_checksums([array])
    for place in range(array.size):
        for bit in range(8 * array.itemsize):
            flipped = array.copy()
            flipped[place] ^= dtype(1 << bit)
            assert tree_checksums([flipped]) != before
    # Two signs are the flips that a sum of products of odd numbers would miss.
    both = array.copy()
    both[[1, 3]] ^= dtype(1 << (8 * array.itemsize - 1))
    assert tree_checksums([both]) != before
    assert tree_checksums([array[::-1]]) != before


def test_the_message_names_the_place_and_the_arrays(tmp_path):
    tree = {"a": {0: np.arange(3), 1: np.ones(4, np.float64)}, "b": np.ones(2)}
    metadata = checksums_metadata(tree_checksums(tree))
    check_tree(tmp_path, tree, metadata)
    check_tree(tmp_path, {"b": tree["b"]}, metadata)
    tree["a"][1] = -tree["a"][1]
    with pytest.raises(HymbaError, match=rf"^{tmp_path}: damaged.*do not match \(a\.1\)"):
        check_tree(tmp_path, tree, metadata)
    for nothing in (None, {}, {"checksums": None}):
        with pytest.raises(HymbaError, match=f"^{tmp_path}: has no checksums"):
            check_tree(tmp_path, tree, nothing)
    with pytest.raises(HymbaError, match=r"do not match \(b"):
        check_tree(tmp_path, {"b": tree["b"]}, {"checksums": {}})
