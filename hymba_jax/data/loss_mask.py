"""`NAME.mask`: a byte for each token of `NAME.bin`, 1 where the loss is on it and 0 elsewhere.

Shards of conversations have it. The loss is on all tokens of the others.
"""

import os
import secrets
from pathlib import Path
from types import TracebackType

import numpy as np

from hymba_jax.data.block_checksums import BlockChecksums, checksums_file
from hymba_jax.data.megatron import megatron_files
from hymba_jax.files import PathLike, replace_text
from hymba_jax.types import Bool


def mask_file(path: PathLike) -> Path:
    """The mask of a shard, which is named as `megatron_files` takes it."""
    return megatron_files(path)[0].with_suffix(".mask")


class MaskWriter:
    """Writes a mask: a context, at whose end it is there with its checksums, `NAME.mask.crc`.

    An exception leaves whatever was there before.
    """

    def __init__(self, path: PathLike) -> None:
        self._target = mask_file(path)
        name = f"{self._target.name}.{secrets.token_hex(4)}.partial"
        self._partial = self._target.with_name(name)
        self._checksums = BlockChecksums()

    def __enter__(self) -> "MaskWriter":
        self._file = self._partial.open("xb")
        return self

    def write(self, mask: Bool[np.ndarray, " tokens"]) -> None:
        """Adds that of a document."""
        content = mask.astype(np.uint8)
        self._file.write(content.data)
        self._checksums.update(content)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                os.replace(self._partial, self._target)
                replace_text(checksums_file(self._target), self._checksums.text())
        finally:
            self._partial.unlink(missing_ok=True)
