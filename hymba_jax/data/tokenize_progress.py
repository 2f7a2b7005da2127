"""How far tokenizing is, as a line of a display."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader

from hymba_jax.data.listing import File
from hymba_jax.display import Display, duration

# Seconds between updates of a live line, and between lines elsewhere.
_UPDATE, _LOG = 0.2, 30.0


class Progress:
    """How far tokenizing is.

    Attributes:
      total_bytes: of all files, as they are stored.
      documents, tokens, text_bytes: what was tokenized, by this process.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.documents = self.tokens = self.text_bytes = 0
        self._bytes_before = 0  # of the files before the one that is read
        self._stream: BufferedReader | None = None

    @property
    def done_bytes(self) -> int:
        """Bytes of the files that were read or are done since an earlier run."""
        stream = self._stream
        return self._bytes_before + (0 if stream is None or stream.closed else stream.tell())

    def skip(self, files: Iterable[File]) -> None:
        """Counts files that are done."""
        self._bytes_before += total_size(files)

    def following(self, files: Iterable[File]) -> Iterator[File]:
        """The same files, whose reading is followed."""
        for file in files:
            yield _FollowedFile(file.name, file.path, file.size, progress=self)
            self._stream = None
            self._bytes_before += file.size or 0

    def begin(self, stream: BufferedReader) -> None:
        """Follows the reading of this file now."""
        self._stream = stream


@dataclass(frozen=True, kw_only=True)
class _FollowedFile(File):
    progress: Progress

    def open(self) -> BufferedReader:
        stream = super().open()
        self.progress.begin(stream)
        return stream


class ProgressLine:
    """Shows progress: on a terminal now, elsewhere now and then."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._begun = self._updated = self._logged = time.monotonic()
        self._done_before: int | None = None

    def show(self, progress: Progress) -> None:
        """Shows it, unless it was shown just now."""
        now = time.monotonic()
        if self._done_before is None:
            self._done_before, self._begun = progress.done_bytes, now
        if now - self._updated < _UPDATE:
            return
        self._updated = now
        line = self._line(progress, now - self._begun, self._done_before)
        self._display.update(line)
        if now - self._logged >= _LOG:
            self._logged = now
            self._display.log(line)

    def _line(self, progress: Progress, seconds: float, before: int) -> str:
        seconds = max(seconds, 1e-3)
        done = min(progress.done_bytes, progress.total_bytes)
        parts = [
            f"{progress.documents / seconds:,.0f} documents/s",
            f"{progress.text_bytes / 1e6 / seconds:,.1f} MB/s",
            f"{progress.tokens / 1e3 / seconds:,.0f} k tokens/s",
        ]
        if progress.total_bytes:
            parts.insert(0, f"{done / progress.total_bytes:.1%}")
        if done > before:
            left = (progress.total_bytes - done) * seconds / (done - before)
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


def with_progress(texts: Iterable[str], display: Display) -> Iterator[str]:
    """The same texts; shows how much of them a tokenizer that is trained on them has read."""
    display.begin("training the tokenizer")
    characters, shown = 0, 0.0
    for text in texts:
        yield text
        characters += len(text)
        if time.monotonic() - shown > _UPDATE:
            shown = time.monotonic()
            display.update(f"training the tokenizer: {characters / 1e6:,.0f} M characters read")


def total_size(files: Iterable[File]) -> int:
    """Bytes of all files, as they are stored, as far as they are known."""
    return sum(file.size or 0 for file in files)
