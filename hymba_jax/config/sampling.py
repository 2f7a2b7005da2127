"""How completions are sampled, from Python and on the command line."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import numpy as np

from hymba_jax.config.escapes import EscapedStr
from hymba_jax.config.field_types import describe, fits, plain, shown
from hymba_jax.errors import HymbaError

INT32_MAX = 2**31 - 1  # positions and tokens are 32-bit numbers
MAX_SAMPLES = 2**20


@dataclass(frozen=True)
class SamplingConfig:
    r"""How the completions of a prompt are sampled.

    NumPy scalars and arrays are accepted and stored as Python numbers and tuples; `stop` may be a
    single string.

    Attributes:
      max_new_tokens: maximum length of the completion.
      temperature: 0 takes the likeliest token each time, 1 samples from the model's distribution.
      top_k: sample from this many of the likeliest tokens; 0 is all. This, top_p, min_p and
        several samples need a temperature above 0: without one they would have no effect and are
        refused.
      top_p: sample from the fewest of the likeliest tokens that have this probability together
        (arXiv 1904.09751); 1 is all.
      min_p: sample from the tokens with at least this share of the likeliest one's probability
        (arXiv 2407.01082); 0 is all.
      repetition_penalty: makes tokens that are in the prompt or the completion already less likely
        (arXiv 1909.05858); 1 disables it.
      frequency_penalty: subtracted from a token's logit for each time that the completion has it;
        negative ones make it likelier.
      presence_penalty: subtracted once from the logits of tokens that the completion has.
      num_samples: completions of each prompt.
      seed: the same seed gives the same completion.
      stop: strings that end a completion and are no part of it. On the command line \n, \r, \t,
        \\, \xHH, \uHHHH and \UHHHHHHHH are escapes; in Python strings are taken as they are.
      stop_tokens: tokens that end it, besides the end-of-sequence token.

    Raises:
      HymbaError: naming every value that is invalid or would have no effect.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    num_samples: int = 1
    seed: int = 0
    stop: tuple[EscapedStr, ...] = ()
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _plain(getattr(self, item.name)))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if problems := [*self._problems()] or [*self._without_effect()]:
            raise HymbaError("sampling: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            possible, limit = LIMITS[name]
            if items := get_args(kind):
                right = type(value) is tuple and all(fits(item, items[0]) for item in value)
                wanted = f"a list, each {describe(items[0])}"
            else:
                right, wanted = fits(value, kind), describe(kind)
            if not right:
                yield f"{name} is {shown(value)}, not {wanted}"
            elif not possible(value):
                yield f"{name} is {shown(value)}, not {limit}"

    def _without_effect(self) -> Iterator[str]:
        if self.temperature > 0:
            return
        needing = ("top_k", "top_p", "min_p", "num_samples")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in needing and value != item.default:
                yield (
                    f"{item.name} {value} has no effect at temperature 0, which always takes the "
                    f"likeliest token: leave out {item.name}, or set a temperature above 0"
                )


def _plain(value: Any) -> Any:
    """The value with Python's numbers for NumPy's, and a tuple for a list or an array."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else plain(value)


def _divides(value: float) -> bool:
    """Whether float32 can divide by it."""
    return 1e-30 <= value <= 1e30


LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda v: 1 <= v <= INT32_MAX, f"between 1 and {INT32_MAX}"),
    "temperature": (lambda v: v == 0 or _divides(v), "0 or between 1e-30 and 1e30"),
    "top_k": (lambda v: 0 <= v <= INT32_MAX, f"between 0 and {INT32_MAX}"),
    "top_p": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "min_p": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "repetition_penalty": (_divides, "between 1e-30 and 1e30"),
    "frequency_penalty": (lambda v: -2 <= v <= 2, "between -2 and 2"),
    "presence_penalty": (lambda v: -2 <= v <= 2, "between -2 and 2"),
    "num_samples": (
        lambda v: 1 <= v <= MAX_SAMPLES,
        f"between 1 and {MAX_SAMPLES}: all completions are kept in memory",
    ),
    "seed": (lambda v: 0 <= v < 2**32, f"between 0 and {2**32 - 1}"),
    "stop": (all, "a list of non-empty strings"),
    "stop_tokens": (lambda v: all(0 <= t <= INT32_MAX for t in v), f"between 0 and {INT32_MAX}"),
}
