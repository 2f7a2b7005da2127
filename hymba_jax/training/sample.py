"""Where training meets text: whether the tokenizer fits the model, and what the model writes."""

from hymba_jax.data import Tokenizer
from hymba_jax.errors import HymbaError
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.model import Hymba
from hymba_jax.run_config import RunConfig


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises HymbaError if the model cannot work with the tokenizer, or not write the sample."""
    tokenizer.check_fits(config.model, config.data.tokenizer)
    length = len(_prompt(config, tokenizer)) + config.training.sample_tokens
    if length > config.model.max_positions:
        raise HymbaError(
            f"training.sample_prompt and sample_tokens make {length} tokens, model.max_positions "
            f"is {config.model.max_positions}: set fewer training.sample_tokens, 0 for no sample"
        )


def sample(config: RunConfig, model: Hymba, tokenizer: Tokenizer) -> str:
    """The prompt of the config and what the model makes of it."""
    training = config.training
    continuation = LanguageModel(model, tokenizer).generate(
        training.sample_prompt,
        max_new_tokens=training.sample_tokens,
        temperature=training.sample_temperature,
        seed=config.seed,
    )
    return training.sample_prompt + continuation[0].text


def _prompt(config: RunConfig, tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.bos_ids, *tokenizer.encode(config.training.sample_prompt)]
