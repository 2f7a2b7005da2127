"""What the model that a stage of preference optimization starts from gives its pairs.

That model is the reference. Its log-probabilities are computed once, before the first step, and
kept in the run directory, as `reference/STAGE.npz`: a run that resumes reads them, and no step
needs its parameters. They take 8 bytes a pair; a second copy of the 1.5B in bfloat16 would take
3 GB. With an adapter nothing is different: before its first step it does nothing.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hymba_jax.checkpoint.checksums import digest, tree_checksums
from hymba_jax.config.field_types import leaves
from hymba_jax.config.stages import Stage
from hymba_jax.data import Batch, validation_batches
from hymba_jax.data.preference_rows import PreferenceRows
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, read_bytes, replace_bytes, resolve_location
from hymba_jax.model.abstract import Params
from hymba_jax.parallel.mesh import global_batch, process_rows, replicated
from hymba_jax.parallel.processes import gather, is_main_process
from hymba_jax.types import Array, Float

FOLDER = "reference"
"""Directory in a run directory."""

type LogProbs = dict[str, Float[np.ndarray, "pairs 2"]]
"""Of the chosen and the rejected answers, by source."""

_ABOUT = "about"  # of the pairs and the model, in the file


@dataclass(frozen=True)
class Reference:
    """The reference of a stage.

    Attributes:
      log_probs: of the answers in a batch, by the parameters of a model.
      rows: all that the stage trains on and validates with, by what messages call the source.
      digests: of their tokens.
      batch_size: sequences at once.
      stops: whether to stop, asked before every batch.
    """

    stage: Stage
    log_probs: Callable[[Params, Batch], Float[Array, "batch pairs 2"]]
    rows: Mapping[str, PreferenceRows]
    digests: Mapping[str, str]
    mesh: Mesh
    batch_size: int
    stops: Callable[[], bool]

    @property
    def num_pairs(self) -> int:
        return sum(rows.num_pairs for rows in self.rows.values())

    def prepare(self, params: Params, step: int) -> None:
        """Gives the rows the log-probabilities of their pairs: those in the file, or computed ones.

        The rows are without them if the run was asked to stop meanwhile.

        Args:
          params: after so many steps of the run.

        Raises:
          HymbaError: the stage has begun, and the file is not there, another, or without a source.
        """
        about = self._about()
        if is_start := step == self.stage.start:
            about |= self._about_model(params)
        found = self._read(about)
        new = sorted(self.rows.keys() - found.keys()) if found is not None else []
        if not all(gather(found is not None and not new)):
            if new and not is_start:
                raise HymbaError(
                    f"{self._path}: has nothing of {', '.join(new)}, new in {self.stage.label}, "
                    "whose reference cannot be computed after it began: leave the source out, or "
                    f"remove the checkpoints after step {self.stage.start} to repeat the stage"
                )
            if not is_start:
                raise HymbaError(
                    f"{self._path}: is missing, damaged or of other pairs, which step {step} "
                    "cannot be resumed without: copy it again, or remove the checkpoints after "
                    f"step {self.stage.start} to repeat {self.stage.label}"
                )
            found = self._compute(params)
            if found is not None and is_main_process():
                self._write(found, about)
        if found is not None:
            for name, rows in self.rows.items():
                rows.reference = found[name]

    @property
    def _path(self) -> Location:
        name = f"{self.stage.name or 'run'}.npz"
        return resolve_location(self.stage.run.output) / FOLDER / name

    def _about(self) -> dict[str, Any]:
        """What the numbers in the file depend on beside the model, and their order."""
        data = self.stage.run.data
        rows = {"length": data.sequence_length, "too_long": data.too_long}
        return {"start": self.stage.start, **rows}

    def _about_model(self, params: Params) -> dict[str, Any]:
        """The model that the stage starts from, and what it computes in."""
        run = self.stage.run
        model = dict(leaves(run.model.resolved(), ""))
        parameters = digest(tree_checksums(params))
        return {"model": model, "dtype": run.compute.dtype, "parameters": parameters}

    def _compute(self, params: Params) -> LogProbs | None:
        """One forward pass over all rows; None if the run was asked to stop."""
        compiled = jax.jit(self.log_probs, out_shardings=replicated(self.mesh))
        found, own = {}, process_rows(self.mesh, self.batch_size)
        for name, rows in self.rows.items():
            found[name] = np.empty((rows.num_pairs, 2), np.float32)
            batches = validation_batches(rows, self.batch_size, None, own)
            for start, batch in zip(range(0, len(rows), self.batch_size), batches, strict=True):
                if self.stops():
                    return None
                batch = global_batch(batch, self.mesh, self.batch_size)
                sides = jax.device_get(compiled(params, batch))
                for row, of_row in enumerate(sides[: len(rows) - start], start):
                    pairs = rows.pairs(row)
                    found[name][pairs] = of_row[: len(pairs)]
        return found

    def _write(self, found: LogProbs, about: Mapping[str, Any]) -> None:
        about = {**about, "digests": dict(self.digests)}
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **{_ABOUT: np.array(json.dumps(about))}, **found)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(self._path, content.getvalue())

    def _read(self, about: Mapping[str, Any]) -> LogProbs | None:
        """What the file has of the rows, which may lack some sources and have had others.

        None if it is not there, is damaged, or is about something else.
        """
        try:
            with np.load(io.BytesIO(read_bytes(self._path)), allow_pickle=False) as arrays:
                stored = json.loads(str(arrays[_ABOUT]))
                digests = stored["digests"]
                found = {name: arrays[name] for name in self.rows if name in digests}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        is_same = all(stored.get(name) == value for name, value in about.items()) and all(
            digests[name] == self.digests[name] for name in found
        )
        return found if is_same else None
