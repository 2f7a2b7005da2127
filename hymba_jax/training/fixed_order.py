"""Sums over a batch in an order that does not depend on the devices.

Float sums depend on their order, and devices enter it twice: each adds up the rows that it has, and
XLA adds up the devices. Here a batch has shards of a fixed size, each of which one device computes
alone, by the same program whatever the number of devices; shards are added one after another.
How XLA fuses operations decides how they round, so a shard is computed in a loop of its own: XLA
compiles the body of a loop apart from what is around it, which differs between meshes. One device
does without XLA's partitioner, so there a shard of other functions might still be fused otherwise:
the slow test compares one device with several for the model.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from hymba_jax.data import Batch
from hymba_jax.model.abstract import Params
from hymba_jax.parallel.mesh import MESH_AXES, batch_shards
from hymba_jax.types import Array, Int


def in_fixed_order(
    function: Callable[[Params, Batch], Any], num_shards: int
) -> Callable[[Params, Batch], Any]:
    """The function, whose results are sums over the rows of a batch, shard by shard.

    Its results have the same bits on every mesh in context whose devices are all along `data` and
    divide `num_shards`. Each holds all parameters and a shard's results.

    Args:
      num_shards: equal shards of a batch; they divide its rows.
    """

    def summed(params: Params, batch: Batch) -> Any:
        num_devices = batch_shards(jax.sharding.get_abstract_mesh())
        size = batch.inputs.shape[0] // num_shards

        def of_device(params: Params, batch: Batch) -> Any:
            def of_shard(index: Int[Array, ""], _: Any = None) -> Any:
                rows = jax.tree.map(
                    lambda a: lax.dynamic_slice_in_dim(a, index * size, size), batch
                )
                return lax.optimization_barrier(function(*lax.optimization_barrier((params, rows))))

            shapes = jax.eval_shape(of_shard, jnp.int32(0))

            def add_round(carry: tuple[Any, Int[Array, ""]]) -> tuple[Any, Int[Array, ""]]:
                totals, index = carry
                zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
                # One round, of which XLA does not know that it is one: else it would be inlined.
                results = lax.fori_loop(index, index + 1, of_shard, zeros)
                return jax.tree.map(_add_devices, totals, results), index + num_devices

            zeros = jax.tree.map(lambda a: jnp.zeros(-(-a.size // num_devices), a.dtype), shapes)
            # From no constant on, as XLA would inline a loop that it knows to be of one round.
            first = lax.axis_index(MESH_AXES["batch"])
            totals, _ = lax.while_loop(
                lambda carry: carry[1] < num_shards, add_round, (zeros, first)
            )
            return jax.tree.map(lambda a, like: _gather(a, like.shape), totals, shapes)

        everywhere = PartitionSpec()
        run: Callable[[Params, Batch], Any] = jax.shard_map(
            of_device, in_specs=everywhere, out_specs=everywhere, check_vma=False
        )
        return lax.optimization_barrier(run(params, batch))

    return summed


def _add_devices(total: Array, result: Array) -> Array:
    """This device's part of the total, with that of each device's result added, in their order."""
    num_devices = lax.axis_size(MESH_AXES["batch"])
    flat = jnp.pad(result.ravel(), (0, total.size * num_devices - result.size))
    parts = lax.all_to_all(flat.reshape(num_devices, -1), MESH_AXES["batch"], 0, 0)
    return functools.reduce(jnp.add, parts, total)


def _gather(part: Array, shape: tuple[int, ...]) -> Array:
    """The whole array, of which each device has a part."""
    flat = lax.all_gather(part, MESH_AXES["batch"], tiled=True)
    return flat[: math.prod(shape)].reshape(shape)
