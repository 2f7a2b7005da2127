"""Models that compile in seconds and complete prompts of bytes, and what they compile."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from flax import nnx

from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.model import Hymba
from hymba_jax.tokenizer import Tokenizer, build_tokenizer


def byte_tokenizer() -> Tokenizer:
    return build_tokenizer("bytes", [])


TINY = HymbaConfig(
    vocab_size=byte_tokenizer().vocab_size,
    hidden_size=16,
    mlp_size=24,
    layers="G W",
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, window=6, rope_type="default"),
    ssm=SSMConfig(state_size=4),
    num_meta_tokens=3,
    max_positions=512,
    bos_token_id=byte_tokenizer().bos_id,
    eos_token_id=byte_tokenizer().eos_id,
)


def make_model(config: HymbaConfig = TINY, **changes: object) -> Hymba:
    """The model of a config with some values changed, as inference takes it.

    Its weights are moved far from where training starts, so that no two tokens are about as likely
    and every part of every layer matters.
    """
    config = dataclasses.replace(config, **changes)
    model = Hymba(config, ComputeConfig(scan_layers=False), nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, weight in nnx.to_flat_state(nnx.state(model)):
        weight[...] += 0.4 * rng.normal(size=weight.shape).astype(weight.dtype)
    return model


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that are compiled inside."""
    names: list[str] = []

    def listen(event: str, duration: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
