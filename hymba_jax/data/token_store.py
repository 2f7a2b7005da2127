"""Tokens on disk as one stream, whatever files they are in.

A source is a list of shards, each in Megatron's format (`NAME.bin` with `NAME.idx`), a flat `.bin`
of token ids, or a `.npy` of them. Shards are memory-mapped, so that opening a source takes neither
time nor memory in proportion to its tokens.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from hymba_jax.data.megatron import MegatronShard, file_size, map_array, megatron_files
from hymba_jax.errors import HymbaError
from hymba_jax.files import PathLike, resolve_path
from hymba_jax.types import Bool, Int, UInt

FLAT_DTYPES = ("uint16", "uint32")
"""Of token ids in a flat `.bin`; a `.npy`, which says what it holds, may be int32 too."""


class FlatShard:
    """Token ids one behind another in a `.bin`, or in a `.npy` as an array of one dimension.

    Args:
      path: of the file.
      dtype: of a `.bin`, one of FLAT_DTYPES.
      eos_id: the token that ends every document; None if they are not told apart.

    Raises:
      HymbaError: the file is not there, is of another kind, or is truncated.
    """

    num_documents = None  # it would take reading all tokens
    has_mask = False  # the loss is on all tokens

    def __init__(self, path: PathLike, dtype: str | None = None, eos_id: int | None = None) -> None:
        self.path, self._eos_id = resolve_path(path), eos_id
        self._tokens = _map_npy(self.path) if _is_npy(self.path) else _map_bin(self.path, dtype)
        self.num_tokens = len(self._tokens)

    def read(self, start: int, stop: int) -> UInt[np.ndarray, " _"]:
        """The tokens from `start` up to `stop`, in the byte order of this machine; read-only."""
        tokens = self._tokens[start:stop]
        return tokens.astype(tokens.dtype.newbyteorder("="), copy=False)

    def read_mask(self, start: int, stop: int) -> Bool[np.ndarray, " _"]:
        """Whether the loss is on each of the tokens from `start` up to `stop`."""
        return np.ones(stop - start, bool)

    def document_starts(self, start: int, stop: int) -> Int[np.ndarray, " _"]:
        """The positions from `start` up to `stop` at which documents start, rising.

        The tokens before them are read.

        Raises:
          HymbaError: no token is known to end documents.
        """
        if self._eos_id is None:
            raise HymbaError(f"{self.path}: its documents are not told apart: give its eos_id")
        before = max(start - 1, 0)
        (ends,) = np.nonzero(self._tokens[before : max(stop - 1, 0)] == self._eos_id)
        starts = before + 1 + ends
        return np.concatenate([[0], starts]) if start == 0 < stop else starts


type Shard = MegatronShard | FlatShard
"""Tokens of one file; documents do not go on from one shard to the next."""


class TokenStore:
    """The tokens of several shards as one stream; shards without any are left out.

    Attributes:
      num_tokens: all of them.
      has_mask: whether the loss is on some of the tokens only: documents are conversations.

    Args:
      vocab_size: token ids are below it, which is checked where they are read; None if what wrote
        the shards has checked that.

    Raises:
      HymbaError: there are no tokens.
    """

    def __init__(self, shards: Sequence[Shard], vocab_size: int | None = None) -> None:
        self._vocab_size = vocab_size
        self._shards = [shard for shard in shards if shard.num_tokens]
        if not self._shards:
            names = ", ".join(str(shard.path) for shard in shards[:3])
            raise HymbaError(f"{names or 'no shards'}: no tokens")
        self.has_mask = any(shard.has_mask for shard in self._shards)
        self._offsets = [0, *accumulate(shard.num_tokens for shard in self._shards)]
        self.num_tokens = self._offsets[-1]

    @cached_property
    def num_documents(self) -> int | None:
        """Documents that are not empty; None where it would take reading all tokens."""
        counts = [shard.num_documents for shard in self._shards]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def read(self, start: int, stop: int) -> UInt[np.ndarray, " _"]:
        """The tokens from `start` up to `stop`; not to be written to.

        Raises:
          IndexError: the stream has no such tokens.
          HymbaError: one of them is outside of the vocabulary.
        """
        parts = []
        for shard, _, a, b in self._ranges(start, stop):
            tokens = shard.read(a, b)
            if self._vocab_size is not None and tokens.size and tokens.max() >= self._vocab_size:
                raise HymbaError(
                    f"{shard.path}: has token {tokens.max()} among tokens {a} to {b}, the "
                    f"tokenizer has {self._vocab_size}: it was made by another one"
                )
            parts.append(tokens)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_mask(self, start: int, stop: int) -> Bool[np.ndarray, " _"]:
        """Whether the loss is on each of the tokens from `start` up to `stop`.

        Raises:
          IndexError: the stream has no such tokens.
        """
        ranges = self._ranges(start, stop)
        return np.concatenate([shard.read_mask(a, b) for shard, _, a, b in ranges])

    def document_starts(self, start: int, stop: int) -> Int[np.ndarray, " _"]:
        """The positions from `start` up to `stop` at which documents start, rising.

        Every shard starts with a document.

        Raises:
          IndexError: the stream has no such tokens.
          HymbaError: a shard's documents are not told apart.
        """
        return np.concatenate(
            [
                offset + shard.document_starts(a, b)
                for shard, offset, a, b in self._ranges(start, stop)
            ]
        )

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int, int]]:
        """The shards of a range, at least one, with their offsets and the ranges of their own."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        first = min(bisect_right(self._offsets, start), len(self._shards)) - 1
        for i in range(first, len(self._shards)):
            offset = self._offsets[i]
            if i > first and offset >= stop:
                return
            yield (
                self._shards[i],
                offset,
                max(start - offset, 0),
                min(stop, self._offsets[i + 1]) - offset,
            )


def open_tokens(
    paths: Sequence[PathLike],
    dtype: str | None = None,
    eos_id: int | None = None,
    vocab_size: int | None = None,
) -> TokenStore:
    """The shards at these paths, in their order, as one stream.

    Args:
      paths: `.npy`, or `.bin`, or `NAME`, `NAME.bin` or `NAME.idx` of Megatron's format, which is
        what a `.bin` with an `.idx` beside it is taken for.
      dtype: of flat `.bin` files, one of FLAT_DTYPES.
      eos_id: the token that ends the documents of flat files and of `.npy`, if there is one.
      vocab_size: token ids are below it.

    Raises:
      HymbaError: a shard cannot be used, or all of them are empty.
    """
    shards = [_open_shard(resolve_path(path), dtype, eos_id) for path in paths]
    return TokenStore(shards, vocab_size)


def _open_shard(path: Path, dtype: str | None, eos_id: int | None) -> Shard:
    if _is_npy(path) or is_flat(path):
        return FlatShard(path, dtype, eos_id)
    return MegatronShard(path)


def is_flat(path: Path) -> bool:
    """Whether a file is a `.bin` that is not Megatron's."""
    return path.suffix == ".bin" and not megatron_files(path)[1].exists()


def _is_npy(path: Path) -> bool:
    return path.suffix == ".npy"


def _map_bin(path: Path, dtype: str | None) -> Any:
    if dtype not in FLAT_DTYPES:
        given = "no dtype is given" if dtype is None else f"dtype {dtype!r} is not read"
        raise HymbaError(
            f"{path}: {given}: a .bin without .idx beside it is {' or '.join(FLAT_DTYPES)}"
        )
    kind = np.dtype(dtype).newbyteorder("<")
    size = file_size(path)
    if size % kind.itemsize:
        raise HymbaError(f"{path}: {size} bytes are no whole number of {dtype} tokens: truncated?")
    return map_array(path, kind, size // kind.itemsize)


def _map_npy(path: Path) -> Any:
    file_size(path)  # a file that cannot be mapped is refused in one line
    try:
        array = np.lib.format.open_memmap(path, mode="r").view(np.ndarray)
    except (ValueError, EOFError) as error:
        raise HymbaError(f"{path}: not a .npy file, or truncated ({error})") from error
    if array.ndim != 1 or array.dtype.name not in (*FLAT_DTYPES, "int32"):
        raise HymbaError(
            f"{path}: {array.dtype} of shape {array.shape}: token ids are one dimension of "
            f"{', '.join(FLAT_DTYPES)} or int32"
        )
    return array.view(np.dtype(f"u{array.itemsize}").newbyteorder(array.dtype.byteorder))
