"""Sampling a token: by sorting the vocabulary, and from its 64 most likely tokens only.

python benchmarks/sampling.py [--vocab 32001 --batches 1 8] [--json FILE]
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _report import Row, measure, report

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.inference.sampling import Sampler, make_sampler, sample
from hymba_jax.types import Array

CONFIGS = {
    "greedy": SamplingConfig(),
    "temperature": SamplingConfig(temperature=0.8),
    "+ top-k": SamplingConfig(temperature=0.8, top_k=50),
    "+ top-p": SamplingConfig(temperature=0.8, top_p=0.9),
    "all on": SamplingConfig(
        temperature=0.8, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.2
    ),
}


@dataclass(frozen=True)
class Options:
    """Sizes; by default Hymba-1.5B's vocabulary."""

    vocab: int = 32001
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 50
    json: Path | None = None


def from_sorted(
    candidates: int, logits: Array, seen: Array, positions: Array, sampler: Sampler
) -> tuple[Array, Array]:
    """As most people write it, with nothing left out: exact if every token is a candidate."""
    temperature, top_k, top_p, min_p, penalty = (values[:, None] for values in sampler[:5])
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    penalised = jnp.where(seen, penalised, logits)
    falling, tokens = jax.lax.top_k(penalised, candidates)
    falling = falling / jnp.where(temperature > 0, temperature, 1)
    rank = jnp.arange(candidates)[None]
    falling = jnp.where((rank < top_k) | (top_k == 0), falling, -jnp.inf)
    chances = jax.nn.softmax(falling)
    kept = (jnp.cumsum(chances, axis=1) - chances < top_p) & (chances >= min_p * chances[:, :1])
    keys = jax.vmap(jax.random.fold_in)(sampler.key, positions)
    sampled = jax.vmap(jax.random.categorical)(keys, jnp.where(kept, falling, -jnp.inf))
    sampled = jnp.where(sampler.temperature > 0, sampled, 0)
    new = jnp.take_along_axis(tokens, sampled[:, None], axis=1)
    return new[:, 0], jnp.take_along_axis(jax.nn.log_softmax(logits), new, axis=1)[:, 0]


def main(options: Options) -> None:
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for batch in options.batches:
        logits = jnp.asarray(3 * rng.normal(size=(batch, options.vocab)), jnp.float32)
        seen = jnp.asarray(rng.random(logits.shape) < 0.01)
        for name, config in CONFIGS.items():
            sampler = make_sampler([config] * batch, range(batch))
            inputs = logits, seen, jnp.arange(batch), sampler
            row: Row = {"batch": batch, "values": name}
            row["hymba_jax ms"], _ = measure(sample, *inputs, repeats=options.repeats)
            for label, candidates in (("sorted ms", options.vocab), ("64 likeliest ms", 64)):
                function = functools.partial(from_sorted, candidates)
                row[label], _ = measure(function, *inputs, repeats=options.repeats)
            rows.append(row)
    report(f"a token from a vocabulary of {options.vocab}", rows, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
