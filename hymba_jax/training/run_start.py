"""What a run is started with, and what is known of the starts before: `starts.jsonl`."""

import dataclasses
import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hymba_jax.config.run import RunConfig
from hymba_jax.files import parse_json, resolve_location
from hymba_jax.training.git_state import git_state

STARTS = "starts.jsonl"  # inside the run directory


class RunStart(NamedTuple):
    """A start of a run.

    Attributes:
      directory: the run directory, or a local one of which it is a copy.
      step: the last one whose metrics count; a resumed run writes those of later steps again.
      is_resumed: whether the run resumes from a checkpoint.
      id: by which tools know the run; it is the same after resuming.
      tracked: the last step that such a tool may have of the run already.
      config: all options of the run, as a JSON object.
      git: see `git_state`.
    """

    directory: Path
    step: int = 0
    is_resumed: bool = False
    id: str = ""
    tracked: int = 0
    config: Mapping[str, Any] = {}
    git: Mapping[str, Any] | None = None


def record_start(
    config: RunConfig, directory: Path, step: int, recorded: int, *, is_resumed: bool
) -> RunStart:
    """Adds a line about this start to `starts.jsonl`.

    Args:
      directory: which it is in.
      step: see `RunStart`.
      recorded: the last step that the run directory has metrics of.

    Raises:
      OSError: the file cannot be read or written.
    """
    file = directory / STARTS
    before = _last_start(file) if is_resumed else None
    if before is None:
        name = resolve_location(config.output).resolve().name
        run_id, tracked = f"{name}-{secrets.token_hex(4)}", 0
    else:  # which may have been resumed from an earlier step than the start before that
        run_id, tracked = before["id"], max(before["tracked"], recorded)
    git = git_state(Path.cwd())
    start = RunStart(directory, step, is_resumed, run_id, tracked, dataclasses.asdict(config), git)
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | start._asdict()
    del line["directory"]
    is_cut = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")  # by a kill
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * is_cut + json.dumps(line) + "\n")
    return start


def _last_start(file: Path) -> dict[str, Any] | None:
    """The last line that is not damaged, if there is one."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            start: dict[str, Any] = parse_json(line)
        except ValueError:  # the line of a start that was killed
            continue
        return start
    return None
