"""What a run writes down: one JSON line a logged step, and the same to TensorBoard."""

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tensorboardX import SummaryWriter

from hymba_jax.files import replace_text

JSON_LINES = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsWriter:
    """Appends to `metrics.jsonl` and `tensorboard/` of a run directory, as a context.

    Whatever a run that stopped has written beyond `step` is dropped, so that the files of a
    resumed run read as if it had never stopped.

    Args:
      run_directory: where; nothing is written if absent.
      step: updates done so far.
    """

    def __init__(self, run_directory: Path | None, step: int):
        self._files = contextlib.ExitStack()
        self._lines: TextIO | None = None
        if run_directory is not None:
            path = run_directory / JSON_LINES
            _keep_until(path, step)
            self._lines = self._files.enter_context(path.open("a", encoding="utf-8"))
            board = SummaryWriter(str(run_directory / TENSORBOARD), purge_step=step + 1)
            self._board = self._files.enter_context(board)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records these values of a step; a float reads back from the JSON as the same float."""
        if self._lines is None:
            return
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step`, and one that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line)
    replace_text(path, "".join(kept))
