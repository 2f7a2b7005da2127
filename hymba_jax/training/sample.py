"""A sample of text from the trained model, at the end of a run."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import Params
from hymba_jax.parallel.mesh import make_mesh, replicated
from hymba_jax.parallel.processes import is_main_process
from hymba_jax.tokenizer import Tokenizer

SAMPLE_FILE = "sample.txt"  # inside the run directory

type Generate = Callable[[Hymba, Tokenizer], str]
"""Text from a model on one device."""


def check_sample(prompt: str, num_tokens: int, tokenizer: Tokenizer, max_positions: int) -> None:
    """Raises HymbaError if the sample has no token to begin with, or too few positions."""
    before = len(tokenizer.bos_ids) + len(tokenizer.encode(prompt))
    if num_tokens and not before:
        raise HymbaError(
            "training.sample_prompt is empty, and the tokenizer has no token to begin with: set a "
            "prompt, or training.sample_tokens 0 for no sample"
        )
    if before + num_tokens > max_positions:
        raise HymbaError(
            f"training.sample_prompt and sample_tokens make {before + num_tokens} tokens, "
            f"model.max_positions is {max_positions}: set fewer training.sample_tokens, 0 for no "
            "sample"
        )


def sample(
    generate: Generate,
    graph: nnx.GraphDef[Hymba],
    params: Params,
    tokenizer: Tokenizer,
    mesh: Mesh,
) -> str | None:
    """The sample, in the main process; None in the others, which must call this, too."""
    everywhere = jax.device_put(params, replicated(mesh))  # collective: all processes
    if not is_main_process():
        return None
    alone = make_mesh(jax.devices()[:1])  # on one device, as inference runs it
    with jax.set_mesh(alone):
        local = jax.tree.map(lambda array: array.addressable_data(0), everywhere)
        return generate(nnx.merge(graph, jax.device_put(local, replicated(alone))), tokenizer)
