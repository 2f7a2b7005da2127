"""The files of an HF (Hugging Face) checkpoint beside its weights, and where they are kept.

A converted model keeps them in its own directory; a run that started from one in a subfolder, since
the run writes its own tokenizer files.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from hymba_jax.files import (
    Location,
    matches,
    read_json,
    remove_tree,
    resolve_location,
    written_beside,
)

HF_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
"""Of an adapter in PEFT's format."""
COPIES_FILE = "hf_copies.json"
"""Tied tensors of an HF checkpoint, which are stored once: name to name."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
OTHER_FILES = (GENERATION_CONFIG, "*.py")  # the HF implementation itself, which config.json names
NO_TOKENIZER = "no tokenizer.json: commands that take or write text need one"
NO_CODE = (
    f"{HF_CONFIG} has no auto_map to the HF implementation: put configuration_hymba.py and "
    "modeling_hymba.py beside it, and an auto_map that names them into it"
)
"""What transformers lacks of a model that was not trained with it."""

_KEPT = "hf_files"  # inside a run directory
_CLASSES = ("AutoConfig", "AutoModelForCausalLM")


def download_advice(directory: Location) -> str:
    """Advice if a missing path looks like the name of a Hugging Face model; else empty."""
    name = str(directory)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or directory.parent.exists():
        return ""
    local = directory.name
    return (
        f": models are not downloaded here; get it from Hugging Face with hf download {name} "
        f"--local-dir {local}, then convert it with hymba convert {local} TARGET"
    )


def hf_directory(directory: Location) -> Location:
    """Where a standalone model or a run keeps the HF files that it comes from, if it has any."""
    kept = directory / _KEPT
    return kept if kept.is_dir() else directory


def companion_files(directory: Location, names: tuple[str, ...]) -> list[Location]:
    """The existing files among these."""
    return [path for name in names for path in matches(directory, name) if path.is_file()]


def keep_hf_files(init_from: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Copies the HF files of the model that a new run starts from into the run directory.

    Args:
      init_from: the model's directory, or empty for a run that starts from none.
      output: the run directory.
    """
    source, kept = resolve_location(init_from), resolve_location(output) / _KEPT
    remove_tree(kept)  # left by a run that ended before its first checkpoint
    if not init_from or not (hf_directory(source) / HF_CONFIG).is_file():
        return
    names = (HF_CONFIG, COPIES_FILE, *TOKENIZER_FILES, *OTHER_FILES)
    with written_beside(kept) as beside:
        for file in companion_files(hf_directory(source), names):
            (beside / file.name).write_bytes(file.read_bytes())


def missing_for_transformers(directory: Location, settings: Mapping[str, Any]) -> list[str]:
    """What transformers lacks to load an HF checkpoint's model and tokenizer, in words.

    Args:
      settings: its config.json.
    """
    missing = []
    auto_map = settings.get("auto_map")
    if not (auto_map and isinstance(auto_map, dict)):
        missing.append(NO_CODE)
    else:
        for name in _CLASSES:
            reference = auto_map.get(name)
            if not isinstance(reference, str):
                missing.append(f"{HF_CONFIG} has no auto_map to the HF implementation for {name}")
            elif "--" not in reference:  # else it is code on Hugging Face
                code = reference.partition(".")[0] + ".py"
                if not (directory / code).is_file():
                    missing.append(f"{code} is missing, the HF implementation that auto_map names")
    if not companion_files(directory, ("tokenizer.json", "tokenizer.model")):
        missing.append("tokenizer.json is missing")
    config = directory / "tokenizer_config.json"
    if not config.is_file() or "tokenizer_class" not in read_json(config):
        missing.append(f"{config.name} has no tokenizer_class")
    return missing
