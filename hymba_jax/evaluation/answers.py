"""Answers of a model to requests, kept in a file, so that an interrupted evaluation resumes."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hymba_jax.errors import HymbaError
from hymba_jax.inference import LanguageModel
from hymba_jax.inference.fingerprint import model_fingerprint
from hymba_jax.parallel.processes import is_main_process


class Answers:
    """Answers by request, each computed once.

    Args:
      path: file of JSON lines, `{"key": ..., "answer": ...}`, which is read if it exists, and to
        which new answers are appended as they come. It may hold those of several models.
      model: what answers; requests to another one have other keys. Without a path it is not looked
        at.

    Raises:
      HymbaError: the file holds something else.
    """

    def __init__(self, path: Path | None = None, model: LanguageModel | None = None) -> None:
        self._path = path
        self._fingerprint = model_fingerprint(model) if path and model else ""
        self._answers: dict[str, Any] = dict(_read(path)) if path and path.exists() else {}

    def key(self, *request: Any) -> str:
        """The key of a request, which is values of JSON."""
        text = json.dumps([self._fingerprint, *request])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    @property
    def digest(self) -> str:
        """Of what is answered."""
        return hashlib.blake2b(repr(sorted(self._answers)).encode(), digest_size=16).hexdigest()

    def add(self, answers: dict[str, Any]) -> None:
        """Keeps answers, and appends them to the file; of several processes the first does."""
        self._answers |= answers
        if self._path and answers and is_main_process():
            lines = (json.dumps({"key": key, "answer": value}) for key, value in answers.items())
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """The answers in a file; a last line that was not written to its end is removed."""
    whole = path.read_bytes()
    complete = whole[: whole.rfind(b"\n") + 1]
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            record = json.loads(line)
            yield record["key"], record["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise HymbaError(
                f"{path}, line {number}: not an answer of an evaluation: name another file"
            ) from error
    if len(complete) < len(whole):
        with path.open("r+b") as file:
            file.truncate(len(complete))
