"""What the generation_config.json of an HF checkpoint says: end tokens and how to sample.

As in transformers, every one of the end tokens ends a sequence, and the sampling settings are the
defaults of the model. If any sampling option is given explicitly, none is taken from the file.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hymba_jax.config.field_types import describe, fits
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, read_json, resolve_location
from hymba_jax.hf_files import GENERATION_CONFIG, HF_CONFIG, hf_directory

_TYPES: dict[str, Any] = {
    "do_sample": bool,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}
SAMPLING = frozenset(_TYPES) - {"do_sample"}
_TOP_K = 50  # of transformers, where the file says nothing

# Keys that affect no token. Lengths are not taken either: max_new_tokens has a default.
_HARMLESS = frozenset(
    {
        *("_from_model_config", "bos_token_id", "cache_implementation", "disable_compile"),
        *("eos_token_id", "length_penalty", "max_length", "max_new_tokens", "output_attentions"),
        *("output_hidden_states", "output_logits", "output_scores", "pad_token_id"),
        *("return_dict_in_generate", "transformers_version", "use_cache"),
    }
)
_OFF_AT_ONE = ("num_beams", "num_beam_groups", "num_return_sequences", "typical_p")


@dataclass(frozen=True)
class GenerationDefaults:
    """How a model wants to be sampled from.

    Attributes:
      eos_token_ids: tokens that end a sequence, besides the end-of-sequence token of its config.
      sampling: fields of `SamplingConfig`; none is greedy, as the fields' own defaults are.
      unsupported: settings of the file that would change the text and are not used.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()

    def applies(self, given: Iterable[str]) -> bool:
        """Whether `sampling` is to be used when these fields are given explicitly."""
        return bool(self.sampling) and not SAMPLING & {*given}


def read_generation_defaults(directory: Location) -> GenerationDefaults:
    """What a model's directory says, in generation_config.json or, of end tokens, config.json.

    Raises:
      HymbaError: one of these files cannot be read, or has values of a wrong type; all are named.
    """
    path = hf_directory(directory) / GENERATION_CONFIG
    settings = read_json(path) if path.is_file() else {}
    given = {key: settings[key] for key in _TYPES if settings.get(key) is not None}
    problems = [
        f"{key} is {value!r}, not {describe(_TYPES[key])}"
        for key, value in given.items()
        if not fits(value, _TYPES[key])
    ]
    eos = settings.get("eos_token_id")
    if eos is None:
        path_of_eos = hf_directory(directory) / HF_CONFIG
        eos = read_json(path_of_eos).get("eos_token_id") if path_of_eos.is_file() else None
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(fits(token, int) and token >= 0 for token in ids):
        problems.append(f"eos_token_id is {eos!r}, not a token or a list of them")
    if problems:
        raise HymbaError(f"{path}: {'; '.join(problems)}")

    sampling = {key: value for key, value in given.items() if key == "repetition_penalty"}
    if given.pop("do_sample", False):
        sampling = {"temperature": 1.0, "top_k": _TOP_K, **given}
    unsupported = [
        key
        for key, value in settings.items()
        if value and key not in _HARMLESS | {*_TYPES} and not (key in _OFF_AT_ONE and value == 1)
    ]
    return GenerationDefaults(tuple(ids), sampling, tuple(unsupported))


def with_defaults(args: Sequence[str]) -> list[str]:
    """The command line with its model's default sampling options, unless it has some; reports them.

    Raises:
      HymbaError: as for `read_generation_defaults`.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model")
    model = peek.parse_known_args(args)[0].model
    if not model:
        return [*args]
    defaults = read_generation_defaults(resolve_location(model))
    if defaults.unsupported:
        _note(f"{GENERATION_CONFIG}: {', '.join(defaults.unsupported)} not supported, not used")
    options = (arg.removeprefix("--").partition("=")[0] for arg in args if arg.startswith("--"))
    if not defaults.applies(option.replace("-", "_") for option in options):
        return [*args]
    values = ", ".join(f"{key} {json.dumps(value)}" for key, value in defaults.sampling.items())
    _note(f"sampling as the model's {GENERATION_CONFIG} says: {values}")
    return [
        *args,
        *(f"--{key.replace('_', '-')}={value}" for key, value in defaults.sampling.items()),
    ]


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
