"""A training run, put together: the loop, which imports no inference, and its sample."""

from collections.abc import Sequence

from hymba_jax.config.run import RunConfig
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.model import Hymba
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.training import loop
from hymba_jax.training.evaluation import Evaluation
from hymba_jax.training.interrupts import Interrupts


def train(
    config: RunConfig,
    interrupts: Interrupts | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> None:
    """Trains a model, or resumes the run in the run directory; writes a sample at the end.

    Args:
      interrupts: signals for which the run saves a checkpoint and returns early.
      evaluations: run on their schedules, beside validation.

    Raises:
      HymbaError: the run cannot be what the config says, cannot be written, or diverged.
    """
    training = config.training

    def generate(model: Hymba, tokenizer: Tokenizer) -> str:
        (completion,) = LanguageModel(model, tokenizer).generate(
            training.sample_prompt,
            max_new_tokens=training.sample_tokens,
            temperature=training.sample_temperature,
            seed=config.seed,
        )
        return training.sample_prompt + completion.text

    loop.train(config, generate, interrupts=interrupts, evaluations=evaluations)
