"""`hymba generate`: a prompt continued, written as it comes."""

from dataclasses import dataclass

from tokenizers.decoders import DecodeStream

from hymba_jax.inference.decoding import generate
from hymba_jax.inference.loading import load


@dataclass(frozen=True)
class GenerateConfig:
    """Continues a prompt with a trained model.

    Attributes:
      model: the run directory.
      prompt: what to continue.
      max_new_tokens: where to stop, if the text does not end before.
      temperature: 0 takes the likeliest token each time, 1 samples from the model's distribution.
      seed: of the sampling; the same seed gives the same text.
      step: which checkpoint; the newest if absent.
    """

    model: str
    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0
    step: int | None = None


def main(config: GenerateConfig) -> None:
    """Writes the prompt and its continuation to standard output.

    Raises:
      HymbaError: there is no such model, or it cannot do what is asked.
    """
    model, tokenizer = load(config.model, config.step)
    prompt = [tokenizer.bos_id, *tokenizer.encode(config.prompt)]
    tokens = generate(
        model, prompt, config.max_new_tokens, temperature=config.temperature, seed=config.seed
    )
    stream = DecodeStream(skip_special_tokens=True)  # holds back characters that are not whole
    print(config.prompt, end="", flush=True)
    for token in tokens:
        print(stream.step(tokenizer.model, token) or "", end="", flush=True)
    print()
