"""Checksums of token files, checked where they are read: opening a corpus reads none of it.

`NAME.bin.crc` has the CRC-32 of each block of `NAME.bin`, a line of eight hexadecimal digits each.
The manifest has those of this file and of the index.
"""

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from hymba_jax.data.manifest import ShardInfo
from hymba_jax.data.megatron import MegatronShard, file_size, megatron_files
from hymba_jax.errors import HymbaError
from hymba_jax.files import PathLike
from hymba_jax.types import Bool, UInt

BLOCK = 1 << 16
"""Bytes of a block; the last one has the rest."""

# Bytes of an index that is checked whole when its shard is opened.
_SMALL_INDEX = 1 << 26
_LINE = len("01234567\n")


class BlockChecksums:
    """The checksums of what is written to a token file, one array after the other."""

    def __init__(self) -> None:
        self._complete: list[int] = []
        self._checksum, self._size = 0, 0  # of the block that is not complete

    def update(self, tokens: np.ndarray) -> None:
        """Adds tokens, which are contiguous, as they are in memory."""
        content = tokens.view(np.uint8)
        while len(content):
            part, content = content[: BLOCK - self._size], content[BLOCK - self._size :]
            self._checksum = zlib.crc32(part, self._checksum)
            self._size += len(part)
            if self._size == BLOCK:
                self._complete.append(self._checksum)
                self._checksum, self._size = 0, 0

    def text(self) -> str:
        """The content of the `.crc` file."""
        checksums = [*self._complete, self._checksum] if self._size else self._complete
        return "".join(f"{checksum:08x}\n" for checksum in checksums)


class VerifiedShard(MegatronShard):
    """A shard whose bytes are compared with their checksums when they are first read.

    Opening it compares the sizes of its files, and the index, if that has up to 64 MiB.

    Args:
      path: `NAME`, as of any shard of Megatron's format.
      info: what the manifest has about it.
      itemsize: bytes of a token.

    Raises:
      HymbaError: a file is not there, has another size, or is damaged.
    """

    def __init__(self, path: PathLike, info: ShardInfo, itemsize: int) -> None:
        tokens, self._index = megatron_files(path)
        self._checksums_path, self._info = checksums_file(tokens), info
        size = info.tokens * itemsize
        self._num_blocks = -(-size // BLOCK)
        for file, expected in (
            (tokens, size),
            (self._index, info.index_bytes),
            (self._checksums_path, _LINE * self._num_blocks),
        ):
            if (actual := file_size(file)) != expected:
                raise HymbaError(
                    f"{file}: {actual} bytes, but the manifest says {expected}: truncated or "
                    "replaced: copy the file again"
                )
        if info.index_bytes <= _SMALL_INDEX:
            self.check_index()
        super().__init__(path)
        # Of each block its checksum, and whether it was compared: both once a token is read.
        self._checksums: UInt[np.ndarray, " _"] | None = None
        self._is_checked: Bool[np.ndarray, " _"] | None = None

    def read(self, start: int, stop: int) -> UInt[np.ndarray, " _"]:
        """The tokens from `start` up to `stop` of the stream; read-only.

        Raises:
          HymbaError: a block that they are in is damaged.
        """
        if start < stop:
            first = start * self._itemsize // BLOCK
            last = (stop * self._itemsize - 1) // BLOCK
            for block in range(first, last + 1):
                self._check_block(block)
        return super().read(start, stop)

    def damage(self) -> list[str]:
        """Reads all of the shard and says what is damaged, a line for each block."""
        checks: list[Callable[[], None]] = [self.check_index, self.check]
        checks += (partial(self._check_block, block) for block in range(self._num_blocks))
        lines = []
        for check in checks:
            try:
                check()
            except HymbaError as error:
                lines.append(str(error))
        return lines

    def check_index(self) -> None:
        """Raises HymbaError if the index is damaged."""
        if file_checksum(self._index) != self._info.index_crc32:
            raise _damaged(self._index, "")

    def _check_block(self, block: int) -> None:
        if self._checksums is None or self._is_checked is None:
            self._checksums = self._read_checksums()
            self._is_checked = np.zeros(self._num_blocks, bool)
        if self._is_checked[block]:
            return
        tokens = BLOCK // self._itemsize
        content = self._tokens[block * tokens : (block + 1) * tokens]
        if zlib.crc32(content) != self._checksums[block]:
            where = f" in block {block}, {content.nbytes} bytes from {block * BLOCK}"
            raise _damaged(self.path, where)
        self._is_checked[block] = True

    def _read_checksums(self) -> UInt[np.ndarray, " _"]:
        content = self._checksums_path.read_bytes()
        if zlib.crc32(content) != self._info.blocks_crc32:
            raise _damaged(self._checksums_path, "")
        return np.frombuffer(bytes.fromhex(content.decode()), ">u4")


def checksums_file(tokens: Path) -> Path:
    """The file with the checksums of a token file."""
    return tokens.with_name(f"{tokens.name}.crc")


def file_checksum(path: Path) -> int:
    """The CRC-32 of all bytes of a file."""
    checksum = 0
    with path.open("rb") as file:
        while content := file.read(1 << 20):
            checksum = zlib.crc32(content, checksum)
    return checksum


def _damaged(path: Path, where: str) -> HymbaError:
    return HymbaError(
        f"{path}: damaged{where} (its checksum is another): copy the file again, or tokenize the "
        "corpus again"
    )
