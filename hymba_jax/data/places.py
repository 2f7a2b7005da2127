"""Where the sources of a run are, and whether they are text, tokens or generated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from hymba_jax.config.data import DataConfig, SourceConfig, is_generated
from hymba_jax.data.listing import is_url
from hymba_jax.data.manifest import MANIFEST
from hymba_jax.data.recall import RecallTask
from hymba_jax.data.token_files import find_token_files
from hymba_jax.data.token_store import is_flat
from hymba_jax.data.tokenized import is_tokenized, read_manifest
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, resolve_location, resolve_path

TOKENS = "tokens"
"""Directory in a run directory: a tokenized corpus for each source that is text."""


@dataclass(frozen=True)
class Place:
    """Where a source is, as it is opened.

    Attributes:
      name: what `Data.digests` calls its tokens.
      label: what messages call it.
      source: of the config.
      held_out: share of the documents that are for validation, if it is text.
      directory: for its tokens, if it is text.
    """

    name: str
    label: str
    source: SourceConfig
    held_out: float
    directory: Location

    @property
    def path(self) -> str:
        return self.source.path

    @property
    def is_text(self) -> bool:
        return not (self.task or self._is_tokenized or self.token_files)

    @cached_property
    def task(self) -> RecallTask | None:
        """The task, if it is generated. Raises HymbaError if there is no such task."""
        if not is_generated(self.path):
            return None
        try:
            return RecallTask.parse(self.path)
        except HymbaError as error:
            raise HymbaError(f"{self.label}: {error}") from error

    @property
    def is_held_out(self) -> bool:
        """Whether it is a source of validation."""
        return self.held_out == 1

    @property
    def tokenized(self) -> Path | None:
        """The tokenized corpus; None if it is files of tokens, or generated."""
        if self._is_tokenized:
            return resolve_path(self.path)
        return resolve_path(self.directory) if self.is_text else None

    @cached_property
    def files(self) -> frozenset[Path]:
        """The files of tokens, or the directory of a tokenized corpus, wherever links lead."""
        paths = [resolve_path(self.path)] if self._is_tokenized else self.token_files
        return frozenset(path.resolve() for path in paths)

    @cached_property
    def token_files(self) -> list[Path]:
        return [] if self.task else find_token_files(self.path)

    @cached_property
    def _is_tokenized(self) -> bool:
        is_local = bool(self.path) and not (self.task or is_url(self.path))
        return is_local and is_tokenized(resolve_path(self.path))


def read_places(config: DataConfig, output: str) -> Iterator[tuple[bool, str, Place]]:
    """Of each source that is read whether it is for training, its name, and where it is."""
    root = resolve_location(output) / TOKENS
    held_out = 0.0 if config.validation else config.validation_fraction
    for name, source in config.train_sources.items():
        if source.weight:
            label = f"data.sources.{name}" if config.sources else "data.path"
            directory = root / "train" / name
            yield True, name, Place(f"training source {name}", label, source, held_out, directory)
    for name, held_out_source in config.validation.items():
        label, directory = f"data.validation.{name}", root / "validation" / name
        yield (
            False,
            name,
            Place(f"validation source {name}", label, held_out_source, 1.0, directory),
        )


def text_manifests(config: DataConfig, output: str) -> list[Location]:
    """The manifests of all sources that are text, which the process writes that tokenizes them."""
    places = (place for _, _, place in read_places(config, output) if place.is_text)
    return [place.directory / MANIFEST for place in places]


class Formats(NamedTuple):
    """What the records of each source are, as `data.format`, by its name.

    Attributes:
      train, validation: of sources of training, and of those that are for validation alone.
    """

    train: dict[str, str]
    validation: dict[str, str]


def source_formats(config: DataConfig, output: str) -> Formats:
    """The formats of all sources, by manifests alone. Raises HymbaError where one is bad."""
    formats = Formats({}, {})
    for is_training, name, place in read_places(config, output):
        found: str = config.format_of(place.source)
        if not place.is_text:
            found = read_manifest(place.tokenized)[0].format if place.tokenized else "text"
        (formats.train if is_training else formats.validation)[name] = found
    return formats


def check_places(places: Sequence[Place]) -> None:
    """Raises HymbaError if tokens are on both sides, or an option of a source has no effect."""
    for place in places:
        source = place.source
        if source.text_field and not place.is_text:
            raise HymbaError(
                f"{place.label}.text_field has no effect: {place.path} is tokenized already: leave "
                "it out"
            )
        if source.token_dtype and not any(map(is_flat, place.token_files)):
            raise HymbaError(
                f"{place.label}.token_dtype has no effect: {place.path} is no flat .bin: leave it "
                "out"
            )
    for held_out in (place for place in places if place.is_held_out and not place.is_text):
        for place in places:
            if not (place.is_held_out or place.is_text) and place.files & held_out.files:
                raise HymbaError(
                    f"{held_out.path}: is {place.label}, too, which is trained on: leave out "
                    f"{held_out.label}, or name tokens of other documents"
                )
