"""Preference optimization: DPO (arXiv 2305.18290) and SimPO (arXiv 2405.14734).

A row of a batch has pairs, whose chosen and rejected sides are its documents 1 and 2, 3 and 4, and
so on (`data/preference_rows.py`). The loss is a mean over pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hymba_jax.config.dpo import DPOConfig
from hymba_jax.data import IGNORED_TARGET, Batch
from hymba_jax.model import Hymba
from hymba_jax.ops.cross_entropy import token_nats
from hymba_jax.training.loss import Average, Averages
from hymba_jax.types import Array, Float


class Sides(NamedTuple):
    """A number of each side, for as many pairs as a row might have; 0 where there is none."""

    chosen: Float[Array, "batch pairs"]
    rejected: Float[Array, "batch pairs"]


def preference_loss(model: Hymba, batch: Batch, dpo: DPOConfig) -> Averages:
    """The objective of preference optimization, as `DPOConfig` has it, and its metrics.

    `reward_accuracy` is the share of pairs whose chosen answer has the higher reward, and
    `reward_margin` the mean difference: rewards are beta r. `chosen_log_prob` and
    `rejected_log_prob` are means of log p over answers. With a reference, `kl` is the mean of
    log p - log p_ref over the answers of both sides: if the model itself had written them, an
    estimate of the divergence from the reference per answer.
    """
    log_probs = answer_log_probs(model, batch)
    tokens = _by_side((batch.targets != IGNORED_TARGET).astype(jnp.float32), batch)
    ratios = log_probs
    if dpo.has_reference:
        reference = _by_side(batch.reference_log_probs, batch)
        ratios = jax.tree.map(jnp.subtract, log_probs, reference)
    rewards = ratios
    if dpo.is_normalized:
        rewards = jax.tree.map(lambda ratio, n: ratio / jnp.maximum(n, 1), ratios, tokens)
    margins = dpo.beta * (rewards.chosen - rewards.rejected)
    right, wrong = (jax.nn.log_sigmoid(sign * (margins - dpo.gamma)) for sign in (1, -1))
    values = {
        "loss": -(1 - dpo.label_smoothing) * right - dpo.label_smoothing * wrong,
        "reward_accuracy": (margins > 0).astype(jnp.float32),
        "reward_margin": margins,
        "chosen_log_prob": log_probs.chosen,
        "rejected_log_prob": log_probs.rejected,
    }
    if dpo.has_reference:
        values["kl"] = (ratios.chosen + ratios.rejected) / 2
    is_pair = tokens.chosen > 0
    return {
        name: Average(jnp.where(is_pair, value, 0.0).sum(), is_pair.sum())
        for name, value in values.items()
    }


def answer_log_probs(model: Hymba, batch: Batch) -> Sides:
    """The log-probability of each answer: a sum over its tokens."""
    kernel, valid = model.output_projection, batch.targets != IGNORED_TARGET
    nats = token_nats(
        model.last_hidden_state(batch.inputs, batch.segment_ids),
        kernel[...],
        batch.targets,
        valid,
        axes=kernel.get_metadata("axes"),
    )
    return _by_side(-nats, batch)


def _by_side(values: Float[Array, "batch length"], batch: Batch) -> Sides:
    """The sums of values over the documents of each row."""
    assert batch.segment_ids is not None
    pairs = values.shape[1] // 2  # a side has a position, at least

    def sums(values: Array, segment_ids: Array) -> Array:
        return jax.ops.segment_sum(values, segment_ids, 2 * pairs + 1)

    by_document = jax.vmap(sums)(values, batch.segment_ids)[:, 1:]  # without padding, which is 0
    return Sides(by_document[:, ::2], by_document[:, 1::2])
