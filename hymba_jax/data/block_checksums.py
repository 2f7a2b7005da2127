"""Checksums of token files, checked where they are read: opening a corpus reads no tokens.

Indices, about 20 bytes a document, are read to compare them when it is opened, but for large ones.

`NAME.bin.crc` has the CRC-32 of each block of `NAME.bin`, a line of eight hexadecimal digits each,
and so has `NAME.mask.crc` of `NAME.mask`. The manifest has those of these files and of the index.
"""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from hymba_jax.data.manifest import ShardInfo
from hymba_jax.data.megatron import MegatronShard, file_size, map_array, megatron_files
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


class CheckedFile:
    """A mapped file whose blocks are compared with their checksums when they are first read.

    Args:
      path: of the file.
      content: its bytes.
      checksums_crc32: CRC-32 of the `.crc` file beside it.
    """

    def __init__(
        self, path: Path, content: UInt[np.ndarray, " bytes"], checksums_crc32: int
    ) -> None:
        self._path, self._content, self._crc32 = path, content, checksums_crc32
        # Of each block its checksum, and whether it was compared: both once a byte is read.
        self._checksums: UInt[np.ndarray, " _"] | None = None
        self._is_checked: Bool[np.ndarray, " _"] | None = None

    def check(self, start: int, stop: int) -> None:
        """Raises HymbaError if a block is damaged that has some of these bytes."""
        if start < stop:
            for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
                self._check_block(block)

    def block_checks(self) -> Iterator[Callable[[], None]]:
        """A check of each block."""
        for block in range(_num_blocks(len(self._content))):
            yield partial(self._check_block, block)

    def _check_block(self, block: int) -> None:
        if self._checksums is None or self._is_checked is None:
            self._checksums = self._read_checksums()
            self._is_checked = np.zeros(len(self._checksums), bool)
        if self._is_checked[block]:
            return
        content = self._content[block * BLOCK : (block + 1) * BLOCK]
        if zlib.crc32(content) != self._checksums[block]:
            where = f" in block {block}, {content.nbytes} bytes from {block * BLOCK}"
            raise _damaged(self._path, where)
        self._is_checked[block] = True

    def _read_checksums(self) -> UInt[np.ndarray, " _"]:
        path = checksums_file(self._path)
        content = path.read_bytes()
        if zlib.crc32(content) != self._crc32:
            raise _damaged(path, "")
        return np.frombuffer(bytes.fromhex(content.decode()), ">u4")


class VerifiedShard(MegatronShard):
    """A shard whose bytes are compared with their checksums when they are first read.

    Opening it compares the sizes of its files, and the index, if that has up to 64 MiB.

    Args:
      path: `NAME`, as of any shard of Megatron's format.
      info: what the manifest has about it.
      itemsize: bytes of a token.

    Attributes:
      has_mask: whether the loss is on some of the tokens only.

    Raises:
      HymbaError: a file is not there, has another size, or is damaged.
    """

    def __init__(self, path: PathLike, info: ShardInfo, itemsize: int) -> None:
        tokens, self._index = megatron_files(path)
        mask, self._info = tokens.with_suffix(".mask"), info
        files = [(tokens, info.tokens * itemsize)]
        files += [] if info.mask_crc32 is None else [(mask, info.tokens)]
        checksums = [(checksums_file(file), _LINE * _num_blocks(size)) for file, size in files]
        for file, expected in (*files, (self._index, info.index_bytes), *checksums):
            if (actual := file_size(file)) != expected:
                raise HymbaError(
                    f"{file}: {actual} bytes, but the manifest says {expected}: truncated or "
                    "replaced: copy the file again"
                )
        if info.index_bytes <= _SMALL_INDEX:
            self.check_index()
        super().__init__(path)
        self.num_documents = info.documents  # none is empty
        self._checked = CheckedFile(tokens, self._tokens.view(np.uint8), info.blocks_crc32)
        self.has_mask = info.mask_crc32 is not None
        if info.mask_crc32 is not None:
            self._mask = map_array(mask, np.dtype(np.uint8), info.tokens)
            self._checked_mask = CheckedFile(mask, self._mask, info.mask_crc32)

    def read(self, start: int, stop: int) -> UInt[np.ndarray, " _"]:
        """The tokens from `start` up to `stop` of the stream; read-only.

        Raises:
          HymbaError: a block that they are in is damaged.
        """
        self._checked.check(start * self._itemsize, stop * self._itemsize)
        return super().read(start, stop)

    def read_mask(self, start: int, stop: int) -> Bool[np.ndarray, " _"]:
        """Whether the loss is on each of the tokens from `start` up to `stop`.

        Raises:
          HymbaError: a block of the mask is damaged.
        """
        if not self.has_mask:
            return super().read_mask(start, stop)
        self._checked_mask.check(start, stop)
        return self._mask[start:stop] != 0

    def damage(self) -> list[str]:
        """Reads all of the shard and says what is damaged, a line for each block."""
        checks = [self.check_index, self.check, *self._checked.block_checks()]
        checks += self._checked_mask.block_checks() if self.has_mask else []
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


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK)


def checksums_file(tokens: Path) -> Path:
    """The file with the checksums of a token file or a mask."""
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
