"""`hymba warmup`: compiles the programs of generation in advance."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import jax
import tyro
from rich.console import Console

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.files import cache_directory
from hymba_jax.inference import chat
from hymba_jax.inference.batch_state import Request
from hymba_jax.inference.engine import MIN_CHUNK, Engine, bucket
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.inference.loading import ModelChoice


@dataclass(frozen=True)
class WarmupConfig:
    """Compiles the programs of `hymba generate` for one context, and caches them.

    It needs the same `context`, `dtype`, `state_dtype`, `weights` and `kv_cache` later. `hymba
    serve` and `hymba batch` compile theirs before the first request.

    Attributes:
      prompts: largest batch; every power of two up to it is compiled.
      chat: compile those of `hymba chat` instead, which prefills in smaller chunks.
      speculate: whether the later command does.

    Raises:
      HymbaError: no context is named, or no possible number of prompts.
    """

    choice: Annotated[ModelChoice, tyro.conf.arg(name="")]
    prompts: int = 1
    chat: bool = False
    speculate: bool = False

    def __post_init__(self) -> None:
        if self.choice.context is None:
            raise HymbaError("name a context: the size of the cache that programs are compiled for")
        if not 1 <= self.prompts <= self.choice.batch_size:
            raise HymbaError(
                f"prompts is {self.prompts}, not 1 to the batch_size {self.choice.batch_size}"
            )


def main(config: WarmupConfig) -> None:
    """Prints each compilation and its time.

    Raises:
      HymbaError: there is no such model.
    """
    if config.chat:
        model = chat.load(config.choice, speculate=config.speculate)
    else:
        model = config.choice.load(speculate=config.speculate)
    console = Console(soft_wrap=True, highlight=False)
    rows = 1
    while rows <= bucket(config.prompts):
        for length in prompt_lengths(model.engine):
            start = time.perf_counter()
            warm(model, rows, length)
            seconds = time.perf_counter() - start
            console.print(f"{rows} x {length} tokens: {seconds:.1f} s")
        rows *= 2
    console.print(f"kept in {jax.config.jax_compilation_cache_dir}")


def prompt_lengths(engine: Engine) -> Iterator[int]:
    """Prompt lengths that together use every program of prefill."""
    longest, chunk = engine.max_context - 1, engine.max_chunk  # leaves room for a token
    widths = [1 << i for i in range(MIN_CHUNK.bit_length() - 1, chunk.bit_length())]
    for start in (0, chunk):
        for before in (0, *widths[:-1]):  # the next width is for more than that
            if start + before < longest:
                yield start + before + 1


def warm(model: LanguageModel, rows: int, length: int) -> None:
    """Generates two tokens after each of `rows` prompts of `length` tokens, where they fit.

    Of one prompt it also verifies a draft, if the model speculates.
    """
    prompts = [[model.tokenizer.eos_id] * length] * rows
    for delta in model.stream(prompts, max_new_tokens=2):
        del delta
    if model.speculate and rows == 1:
        engine = model.engine
        context = min(length + 2, engine.max_context)
        request = Request(prompts[0], SamplingConfig(), 0, 2)
        state, _ = engine.insert(engine.prefill(prompts, context), [request])
        engine.verify(state, prompts[0][:1])


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, in $XDG_CACHE_HOME or where JAX is told to."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory()))
