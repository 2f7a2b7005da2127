"""Tokens in a bucket, copied to the disk of every host before training.

Training reads a few kilobytes here and there for each row, which are mapped from a disk but would
be a request each to a bucket. A copy is complete and compared with all checksums before it has its
name, which is a digest of its manifest: another corpus at the same URL gets another copy.
"""

import dataclasses
import hashlib
import shutil
from itertools import chain
from pathlib import Path

import numpy as np

from hymba_jax.config.data import DataConfig, SourceConfig
from hymba_jax.data.block_checksums import VerifiedShard
from hymba_jax.data.manifest import MANIFEST, SIDES, Manifest, ShardInfo
from hymba_jax.data.tokenize_records import TOKENIZER_FILES
from hymba_jax.data.tokenized import damage
from hymba_jax.display import Display, format_bytes
from hymba_jax.errors import HymbaError
from hymba_jax.file_lock import waited_for
from hymba_jax.files import about, cache_directory, resolve_location
from hymba_jax.remote import RemotePath, is_remote_path


def with_local_tokens(config: DataConfig, display: Display) -> DataConfig:
    """The same config, with a local copy in place of each tokenized corpus in a bucket.

    Every process of a run calls it. Those of one host share its copy, and later runs do.

    Raises:
      HymbaError: a store refuses it, a file of a corpus is damaged, or the disk is too small.
      OSError: the directory for copies cannot be written.
    """

    def local[T: SourceConfig](source: T) -> T:
        corpus = resolve_location(source.path) if is_remote_path(source.path) else None
        if not isinstance(corpus, RemotePath):
            return source
        if not all((corpus / name).is_file() for name in (MANIFEST, TOKENIZER_FILES[0])):
            return source
        return dataclasses.replace(source, path=str(_copy(corpus, display)))

    return dataclasses.replace(
        config,
        path=local(SourceConfig(config.path)).path,
        sources={
            name: local(source) if source.weight else source
            for name, source in config.sources.items()
        },
        validation={name: local(source) for name, source in config.validation.items()},
    )


def _copy(corpus: RemotePath, display: Display) -> Path:
    """The copy of a tokenized corpus, which is made unless it is there."""
    manifest = (corpus / MANIFEST).read_bytes()
    digest = hashlib.blake2b(manifest, digest_size=16).hexdigest()
    copy = cache_directory() / "tokens" / digest
    copy.parent.mkdir(parents=True, exist_ok=True)
    with waited_for(copy.with_suffix(".lock")):
        if not copy.is_dir():
            partial = copy.with_suffix(".partial")
            if partial.is_dir():
                display.begin(f"comparing what was copied of {corpus}")
            partial.mkdir(exist_ok=True)
            (partial / MANIFEST).write_bytes(manifest)
            with about(corpus, str(partial)):
                _download(corpus, partial, display)
            partial.rename(copy)
            display.say(f"{corpus}: copied to {copy}, where later runs find it")
    return copy


def _download(corpus: RemotePath, directory: Path, display: Display) -> None:
    """Completes a directory, which has the manifest, and whatever an earlier call copied."""
    manifest = Manifest.read(directory / MANIFEST)
    itemsize = np.dtype(manifest.tokenizer.dtype).itemsize
    shards = chain.from_iterable(getattr(manifest, side).shards for side in SIDES)
    there, size = {MANIFEST}, 0
    for shard in shards:
        if _is_there(directory, shard, itemsize):
            there |= {*shard.files}
        else:
            mask = 0 if shard.mask_crc32 is None else shard.tokens
            size += shard.tokens * itemsize + shard.index_bytes + mask
    free = shutil.disk_usage(directory).free
    if free < size:
        raise HymbaError(
            f"{corpus}: the copy for this host needs {format_bytes(size)}, {directory.parent} has "
            f"{format_bytes(free)} free: let XDG_CACHE_HOME name a larger disk, or mount the bucket"
        )
    display.begin(f"copying {corpus} ({format_bytes(size)})")
    corpus.download(directory, lambda name: name not in there and "/" not in name)
    if problem := next(damage(directory), None):
        raise HymbaError(problem)  # the next call copies that shard again


def _is_there(directory: Path, shard: ShardInfo, itemsize: int) -> bool:
    """Whether all files of a shard have been copied.

    Their sizes do not tell: stores' packages may create a file at its full size, then fill it.
    """
    try:
        return not VerifiedShard(directory / shard.name, shard, itemsize).damage()
    except HymbaError:
        return False
