"""generation_config.json: end tokens, and sampling where nobody asks for another."""

import json

import pytest
from inference.models import TINY, byte_tokenizer, make_model

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference.generation_config import (
    GenerationDefaults,
    read_generation_defaults,
    with_defaults,
)
from hymba_jax.inference.language_model import LanguageModel


def write(directory, generation=None, config=None):
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        if values is not None:
            (directory / name).write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, ()),
        (None, {"eos_token_id": [5, 7]}, (5, 7)),
        ({"eos_token_id": 3}, {"eos_token_id": [5, 7]}, (3,)),
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, (3, 4)),
        ({"eos_token_id": None}, {"eos_token_id": 5}, (5,)),
        ({}, {}, ()),
    ],
)
def test_end_tokens(generation, config, expected, tmp_path):
    directory = write(tmp_path, generation, config)
    assert read_generation_defaults(directory).eos_token_ids == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"_from_model_config": True, "use_cache": False, "transformers_version": "4.44.0"}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {}),
        ({"temperature": 0.6}, {}),
        # top_k is 50 where the file says nothing: in transformers 4.57.6 GenerationConfig().top_k,
        # in 5.24.0 GenerationConfig._get_default_generation_params()["top_k"].
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 0},
        ),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_sampling(generation, expected, tmp_path):
    defaults = read_generation_defaults(write(tmp_path, generation))
    assert defaults.sampling == expected
    assert defaults.unsupported == ()


def test_what_is_not_supported_is_said(tmp_path, capsys):
    write(tmp_path, {"num_beams": 4, "typical_p": 1.0, "suppress_tokens": [3], "min_length": 0})
    assert read_generation_defaults(tmp_path).unsupported == ("num_beams", "suppress_tokens")
    assert with_defaults(["--model", str(tmp_path)]) == ["--model", str(tmp_path)]
    assert "num_beams, suppress_tokens not supported, not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": "2"}, "eos_token_id is '2', not a token or a list of them"),
        ({"eos_token_id": [2, True]}, r"eos_token_id is \[2, True\], not a token"),
        (
            {"do_sample": 1, "temperature": "hot"},
            "do_sample is 1.*; temperature is 'hot', not",
        ),
    ],
)
def test_wrong_types(generation, message, tmp_path):
    with pytest.raises(HymbaError, match=f"generation_config.json: {message}"):
        read_generation_defaults(write(tmp_path, generation))


@pytest.mark.parametrize(
    ("args", "used"),
    [
        ([], True),
        (["--max-new-tokens", "3", "--prompt", "x"], True),
        (["--num-samples", "2"], True),
        (["--temperature", "0"], False),
        (["--top_p=0.5"], False),
    ],
)
def test_a_command_uses_them_where_it_has_none_and_says_so(args, used, tmp_path, capsys):
    write(tmp_path, {"do_sample": True, "temperature": 0.6})
    args = ["--model", str(tmp_path), *args]
    added = ["--temperature=0.6", "--top-k=50"] if used else []
    assert with_defaults(args) == [*args, *added]
    assert ("temperature 0.6, top_k 50" in capsys.readouterr().err) == used


def test_a_language_model_stops_at_every_end_token_and_samples_as_it_is_told():
    model = LanguageModel(make_model(TINY), byte_tokenizer(), batch_size=1)
    (greedy,) = model.generate("ab", max_new_tokens=8)
    end = next(token for token in greedy.tokens if token != greedy.tokens[0])
    before = greedy.tokens[: greedy.tokens.index(end)]

    model.defaults = GenerationDefaults(eos_token_ids=(end,), sampling={"temperature": 1.0})
    (stopped,) = model.generate("ab", max_new_tokens=8, temperature=0.0)
    assert stopped.finish_reason == "stop"
    assert [token for token in stopped.tokens if token != end] == before
    asked = SamplingConfig(max_new_tokens=8, temperature=1.0, seed=3)
    assert model.generate("ab", max_new_tokens=8, seed=3) == model.generate("ab", asked)
