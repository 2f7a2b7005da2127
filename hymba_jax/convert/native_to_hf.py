"""A native checkpoint into the directory of an HF one."""

import json
import shutil
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory

from hymba_jax.checkpoint.checksums import dotted
from hymba_jax.convert.arrays import contiguous
from hymba_jax.convert.hf_checkpoint import INDEX
from hymba_jax.convert.hf_config import changed, config_to_hf, read_architecture, with_dtype
from hymba_jax.convert.hf_tokenizer import write_hf_tokenizer
from hymba_jax.convert.mapping import TIED_COPY, hf_shapes
from hymba_jax.convert.native_checkpoint import NativeCheckpoint
from hymba_jax.convert.params_stream import THREADS
from hymba_jax.convert.report import Report
from hymba_jax.convert.tensor_file import TensorFileWriter, TensorInfo
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, read_json
from hymba_jax.hf_files import (
    COPIES_FILE,
    HF_CONFIG,
    OTHER_FILES,
    TOKENIZER_FILES,
    companion_files,
    hf_directory,
    missing_for_transformers,
)
from hymba_jax.tokenizer import Tokenizer


def write_hf(
    checkpoint: NativeCheckpoint,
    directory: Path,
    dtype: str | None,
    max_shard_bytes: int,
    report: Report,
) -> None:
    """Writes the weights of a checked checkpoint, the accompanying files and, last, config.json.

    Args:
      dtype: of every tensor; each keeps its own if absent.
      max_shard_bytes: of tensors in one file.

    Raises:
      HymbaError: the parameters cannot be read.
    """
    copies = _copies(checkpoint)
    tensors = _tensors(checkpoint, copies, dtype)
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda info: info.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    settings = _settings(checkpoint, tensors, dtype)
    files = {
        name: TensorFileWriter(directory / name, {key: tensors[key] for key in keys})
        for name, keys in shards.filename_to_tensors.items()
    }
    places = shards.tensor_to_filename
    _write_weights(checkpoint, copies, {key: files[name] for key, name in places.items()}, report)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": dict(sorted(places.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file in companion_files(hf_directory(checkpoint.directory), OTHER_FILES):
        shutil.copyfile(file, directory / file.name)
    _write_tokenizer(checkpoint, directory, report)
    if settings is None:
        shutil.copyfile(hf_directory(checkpoint.directory) / HF_CONFIG, directory / HF_CONFIG)
    else:
        (directory / HF_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    missing = missing_for_transformers(directory, read_json(directory / HF_CONFIG))
    if missing:
        report.display.say(f"warning: transformers cannot load it: {'; '.join(missing)}")


def _copies(checkpoint: NativeCheckpoint) -> dict[str, str]:
    """HF tensors that equal another: name to name."""
    file = hf_directory(checkpoint.directory) / COPIES_FILE
    copies = read_json(file) if file.is_file() else {}
    if copies not in ({}, TIED_COPY):
        raise HymbaError(f"{file}: broken, it can only hold {json.dumps(TIED_COPY)}")
    return copies


def _write_tokenizer(checkpoint: NativeCheckpoint, directory: Path, report: Report) -> None:
    """The tokenizer files that the model came with, unless it has a tokenizer of its own."""
    own, kept = checkpoint.directory, hf_directory(checkpoint.directory)
    if (kept / HF_CONFIG).is_file():
        files = companion_files(kept, TOKENIZER_FILES)
        if kept == own or (files and _is_same_tokenizer(own, kept)):
            for file in files:
                shutil.copyfile(file, directory / file.name)
            return
        report.display.say("the tokenizer differs from that of the initial model")
    if (own / "tokenizer.json").is_file():
        write_hf_tokenizer(Tokenizer.load(own), checkpoint.config, directory)


def _is_same_tokenizer(*directories: Location) -> bool:
    first, second = (Tokenizer.load(directory) for directory in directories)
    return (first.model.to_str(), first.named_tokens, first.chat_templates) == (
        second.model.to_str(),
        second.named_tokens,
        second.chat_templates,
    )


def _tensors(
    checkpoint: NativeCheckpoint, copies: dict[str, str], dtype: str | None
) -> dict[str, TensorInfo]:
    """What will be written, in the order of the table."""
    stored = {
        part.name: checkpoint.tensors[dotted(part.path)].dtype for part in checkpoint.hf_slices
    }
    tensors = {
        name: TensorInfo(dtype or stored[name], shape)
        for name, shape in hf_shapes(checkpoint.hf_slices).items()
    }
    return tensors | {copy: tensors[name] for copy, name in copies.items()}


def _settings(
    checkpoint: NativeCheckpoint, tensors: dict[str, TensorInfo], dtype: str | None
) -> dict[str, object] | None:
    """The content of config.json; None if unchanged from the original file."""
    kept = hf_directory(checkpoint.directory) / HF_CONFIG
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        sizes[info.dtype] += info.nbytes
    most = sizes.most_common(1)[0][0]
    if not kept.is_file():
        return with_dtype(config_to_hf(checkpoint.config), most)
    original = read_json(kept)
    before = read_architecture(kept.parent, original).resolved()
    settings = changed(original, before, checkpoint.config.resolved())
    if dtype or kept.parent != checkpoint.directory:  # the latter file is of the initial model
        settings = with_dtype(settings, most)
    return None if settings == original else settings


def _write_weights(
    checkpoint: NativeCheckpoint,
    copies: dict[str, str],
    files: dict[str, TensorFileWriter],
    report: Report,
) -> None:
    """Fills all files at the same time, in the order in which the parameters are stored.

    Args:
      files: the file of each tensor, by the tensor's name.
    """
    by_path, names = defaultdict(list), defaultdict(list)
    for part in checkpoint.hf_slices:
        by_path[dotted(part.path)].append(part)
        names[part.name] = [part.name, *(c for c, name in copies.items() if name == part.name)]

    def convert(path: str) -> None:
        array = checkpoint.stored.read(path)
        for part in by_path[path]:
            stored = part.to_hf(array)
            dtype = files[part.name].tensors[part.name].dtype
            rows = contiguous(stored).astype(dtype, copy=False)
            report.converted(part.name, stored, rows)
            for name in names[part.name]:
                files[name].write(name, part.start, rows)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(convert, checkpoint.tensors))
