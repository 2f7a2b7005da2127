"""A corpus that `hymba tokenize` has tokenized: its tokenizer and its two streams of tokens."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hymba_jax.data.block_checksums import VerifiedShard
from hymba_jax.data.manifest import MANIFEST, SIDES, Manifest, ShardInfo
from hymba_jax.data.token_store import TokenStore
from hymba_jax.data.tokenize_records import TOKENIZER_FILES, count_done
from hymba_jax.errors import HymbaError
from hymba_jax.files import PathLike, resolve_path
from hymba_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizedCorpus:
    """Tokens on disk, compared with their checksums when they are first read.

    Attributes:
      directory: where it is.
      manifest: what it says of itself: documents, tokens and UTF-8 bytes of each side, and more.
      digest: of the manifest, and so of every token: short, to compare when a run resumes.
      tokenizer: what made the tokens.
      train, validation: the streams of documents, None of a side without any.
    """

    directory: Path
    manifest: Manifest
    digest: str
    tokenizer: Tokenizer
    train: TokenStore | None
    validation: TokenStore | None

    @property
    def format(self) -> str:
        """What its documents are, as `data.format`; of a pair the chosen side comes first."""
        return self.manifest.format

    def whole(self) -> TokenStore | None:
        """The documents of both sides as one stream; None if there are none."""
        shards = (*self.manifest.train.shards, *self.manifest.validation.shards)
        return _open_shards(self.directory, self.manifest, shards)

    @classmethod
    def open(cls, directory: PathLike) -> "TokenizedCorpus":
        """Opens all shards and compares their sizes, and indices, with the manifest.

        Raises:
          HymbaError: tokenizing is not finished, a file is not there or damaged, or the tokenizer
            is another.
        """
        directory = resolve_path(directory)
        manifest, digest = read_manifest(directory)
        tokenizer = Tokenizer.load(directory)
        if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
            raise HymbaError(
                f"{directory}: its tokenizer.json or tokenizer_config.json is not what made its "
                "tokens: copy both again"
            )
        return cls(
            directory=directory,
            manifest=manifest,
            digest=digest,
            tokenizer=tokenizer,
            train=_open_shards(directory, manifest, manifest.train.shards),
            validation=_open_shards(directory, manifest, manifest.validation.shards),
        )


def is_tokenized(directory: Path) -> bool:
    """Whether `hymba tokenize` writes or has written here."""
    # Text may have a manifest.json of its own.
    is_done = all((directory / name).exists() for name in (MANIFEST, TOKENIZER_FILES[0]))
    return is_done or count_done(directory) is not None


def damage(directory: PathLike) -> Iterator[str]:
    """Reads all shards of a tokenized corpus and says what is damaged, a line each.

    Raises:
      HymbaError: tokenizing is not finished.
    """
    directory = resolve_path(directory)
    manifest, _ = read_manifest(directory)
    itemsize = np.dtype(manifest.tokenizer.dtype).itemsize
    for side in SIDES:
        for info in getattr(manifest, side).shards:
            try:
                shard = VerifiedShard(directory / info.name, info, itemsize)
            except HymbaError as error:
                yield str(error)
            else:
                yield from shard.damage()


def digest_of_tokens(directory: PathLike) -> str | None:
    """`TokenizedCorpus.digest` of what is in a directory; None if tokenizing is not finished."""
    path = resolve_path(directory) / MANIFEST
    if not path.exists():
        return None
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """The manifest and a digest of it.

    Raises:
      HymbaError: tokenizing is not finished, or the file is no manifest.
    """
    digest = digest_of_tokens(directory)
    if digest is None:
        done = count_done(directory)
        if done is None:
            raise HymbaError(f"{directory}: no tokenized corpus: it has no {MANIFEST}")
        raise HymbaError(
            f"{directory}: tokenizing is not finished: {done[0]} of {done[1]} groups of files are "
            "done: run the same `hymba tokenize` again"
        )
    return Manifest.read(directory / MANIFEST), digest


def _open_shards(
    directory: Path, manifest: Manifest, infos: Sequence[ShardInfo]
) -> TokenStore | None:
    itemsize = np.dtype(manifest.tokenizer.dtype).itemsize
    shards = [VerifiedShard(directory / info.name, info, itemsize) for info in infos]
    return TokenStore(shards) if shards else None
