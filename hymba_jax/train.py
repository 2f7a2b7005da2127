"""A training run, put together: the loop, which imports no inference, and its sample."""

from hymba_jax.config.run import RunConfig
from hymba_jax.data import Tokenizer
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.model import Hymba
from hymba_jax.training import loop


def train(config: RunConfig) -> None:
    """Trains a model, or resumes the run in the run directory; writes a sample at the end.

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

    loop.train(config, generate)
