"""The commit that a run is started from."""

import subprocess
from pathlib import Path
from typing import Any

_TIMEOUT = 10  # seconds: a file system of a network can be slow, and training does not wait for it


def git_state(directory: Path) -> dict[str, Any] | None:
    """The repository around a directory: `commit`, and whether tracked files differ (`dirty`).

    None if there is no repository, no commit or no git.
    """
    commit = _git(directory, "rev-parse", "HEAD")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": changes != ""}


def _git(directory: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails."""
    command = ("git", "--no-optional-locks", "-C", str(directory), *arguments)
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
