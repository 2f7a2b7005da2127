"""The sources of a run: text, which is tokenized once into the run directory, or tokens.

One process calls `tokenize_sources`; then all processes open the same tokens.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from hymba_jax.config.data import DataConfig, SourceConfig
from hymba_jax.data import tokenize_records
from hymba_jax.data.content import make_content
from hymba_jax.data.corpus import STANDARD_LIBRARY, Corpus, document_hashes, standard_library
from hymba_jax.data.listing import File, is_url, list_files
from hymba_jax.data.manifest import SIDES, TRAIN, VALIDATION
from hymba_jax.data.token_files import digest_of, find_token_files
from hymba_jax.data.token_store import TokenStore, is_flat, open_tokens
from hymba_jax.data.tokenize_corpus import one_line_full_disk, tokenize_corpus
from hymba_jax.data.tokenize_progress import with_progress
from hymba_jax.data.tokenized import TokenizedCorpus, digest_of_tokens, is_tokenized
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, resolve_location, resolve_path
from hymba_jax.remote import RemotePath
from hymba_jax.tokenizer import Tokenizer, build_tokenizer

TOKENS = "tokens"
"""Directory in a run directory: a tokenized corpus for each source that is text."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a source for training, or for validation.

    Attributes:
      store: documents, one behind another.
      digest: tells them from others: short.
      text_bytes: UTF-8 bytes of their text; None where only decoding would tell.
      is_preference: whether documents are pairs, the chosen one before the rejected.
    """

    store: TokenStore
    digest: str
    text_bytes: int | None = None
    is_preference: bool = False


@dataclass(frozen=True)
class Sources:
    """All sources of a run, opened, by name.

    Attributes:
      tokenizer: what made the tokens.
      notes: what a user should know of them, a line each.
    """

    tokenizer: Tokenizer
    train: dict[str, Tokens]
    validation: dict[str, Tokens]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
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
        return not (self._is_tokenized or self.token_files)

    @property
    def is_held_out(self) -> bool:
        """Whether it is a source of validation."""
        return self.held_out == 1

    @property
    def tokenized(self) -> Path | None:
        """The tokenized corpus; None if it is files of tokens."""
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
        return find_token_files(self.path)

    @cached_property
    def _is_tokenized(self) -> bool:
        return bool(self.path) and not is_url(self.path) and is_tokenized(resolve_path(self.path))


def _places(config: DataConfig, output: str) -> Iterator[tuple[bool, str, _Place]]:
    """Of each source that is read whether it is for training, its name, and where it is."""
    root = resolve_location(output) / TOKENS
    held_out = 0.0 if config.validation else config.validation_fraction
    for name, source in config.train_sources.items():
        if source.weight:
            label = f"data.sources.{name}" if config.sources else "data.path"
            directory = root / "train" / name
            yield True, name, _Place(f"training source {name}", label, source, held_out, directory)
    for name, held_out_source in config.validation.items():
        label, directory = f"data.validation.{name}", root / "validation" / name
        yield (
            False,
            name,
            _Place(f"validation source {name}", label, held_out_source, 1.0, directory),
        )


class Formats(NamedTuple):
    """What the records of each source are, as `data.format`, by its name.

    Attributes:
      train, validation: of sources of training, and of those that are for validation alone.
    """

    train: dict[str, str]
    validation: dict[str, str]


def source_formats(config: DataConfig, output: str) -> Formats:
    """The formats of all sources, of which no text is read. Raises HymbaError as `open_sources`."""
    formats = Formats({}, {})
    for is_training, name, place in _places(config, output):
        found: str = config.format_of(place.source)
        if not place.is_text:
            found = TokenizedCorpus.open(place.tokenized).format if place.tokenized else "text"
        (formats.train if is_training else formats.validation)[name] = found
    return formats


# --- By one process: text to tokens ---


def tokenize_sources(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    output: str,
    check: Callable[[Tokenizer], object],
    display: Display,
    *,
    trained_on: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Tokenizes every source that is text into the run directory, unless it is there already.

    What was interrupted continues. Tokens of other text or options are removed, unless a checkpoint
    depends on them: then their text is not read, and may have moved, but is no other.

    Args:
      tokenizer: that of the run, if it has one already; else that of the sources that are tokens
        or, if all are text, what `config` asks for: a BPE is trained on their training documents.
      output: the run directory, which is no part of a source.
      check: raises HymbaError if the run cannot use a tokenizer, before anything is written.
      trained_on: `Data.digests` of the newest checkpoint.

    Raises:
      HymbaError: a source or the tokenizer is unusable, or they do not go together.
    """
    places = [place for _, _, place in _places(config, output)]
    _check_places(places)
    text_sources = [place for place in places if place.is_text]
    held_out = [place for place in text_sources if place.is_held_out]
    done = [place for place in text_sources if _is_trained_on(place, trained_on)]
    for place in done:
        _check_moved(place, output, display)
    if done:
        text_sources = [place for place in text_sources if place not in done]
        names = ", ".join(place.label for place in done)
        display.say(f"{names}: the run has the tokens, no text is read")
    if not text_sources:
        return
    root = resolve_location(output) / TOKENS
    if isinstance(root, RemotePath):
        text = text_sources[0]
        raise HymbaError(
            f"{output}: text is tokenized into the run directory, which has to be local for that: "
            f"tokenize {text.path or 'a corpus'} with hymba tokenize and name what it wrote as "
            f"{text.label}, or choose a local output"
        )
    display.begin("listing the files")
    listed = {
        place.directory: _list_text(place, output, display) for place in (*text_sources, *held_out)
    }
    recorded = (
        tokenize_records.recorded_exceptions(resolve_path(place.directory)) for place in done
    )
    exceptions = frozenset().union(*recorded)

    def corpora(tokenizer: Tokenizer | None) -> list[Corpus]:
        """The corpora, without documents that are for validation elsewhere: those of text if there
        is no tokenizer, which renders conversations."""

        def of(places: Iterable[_Place]) -> list[tuple[_Place, Corpus]]:
            return [
                (place, _corpus(place, listed[place.directory], config, tokenizer))
                for place in places
                if tokenizer or not config.has_answers(place.source)
            ]

        hashes = document_hashes(corpus for _, corpus in of(held_out))
        return _without_exceptions(
            [
                corpus if place.is_held_out else replace(corpus, excluded=hashes)
                for place, corpus in of(text_sources)
            ],
            exceptions,
        )

    tokenizer = tokenizer or _given_tokenizer(config, places)
    if tokenizer is None:
        documents = corpora(None)
        if not documents:
            raise HymbaError(
                f"data.tokenizer {config.tokenizer} is trained on text, and all sources are "
                "conversations: name a tokenizer, or start from a model with init_from"
            )
        training = chain.from_iterable(corpus.training_texts() for corpus in documents)
        trained = build_tokenizer(config.tokenizer, with_progress(training, display))
        tokenizer = trained.with_chat_template_of(config.chat_template)
    check(tokenizer)
    for place in places:
        if not place.is_text:
            _check_tokens(place, tokenizer, config)
    with one_line_full_disk(root):
        for place, corpus in zip(text_sources, corpora(tokenizer), strict=True):
            _tokenize(place, corpus, tokenizer, display)
            _check_trained_on(place, output, trained_on)


def _tokenize(place: _Place, corpus: Corpus, tokenizer: Tokenizer, display: Display) -> None:
    """Tokenizes a source into its directory, unless that has the same tokens already."""
    directory = resolve_path(place.directory)
    options = {"data.path": corpus.path, **corpus.options, "tokenizer": tokenizer.fingerprint}
    if tokenize_records.difference(directory, options, corpus.files):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenize_records.begin(directory, options, corpus.files, corpus.exceptions)
    tokenizer.save(directory)
    display.begin(f"tokenizing {corpus.path}")
    manifest = tokenize_corpus(corpus, tokenizer, directory, display)
    if manifest and manifest.skipped:
        display.say(
            f"{corpus.path}: skipped {manifest.skipped:,} records, listed in "
            f"{directory / tokenize_records.UNITS}/*.skipped.jsonl"
        )


def _is_trained_on(place: _Place, trained_on: Mapping[str, str]) -> bool:
    """Whether the tokens of a source are there, and those of a checkpoint."""
    directory = resolve_location(place.directory)
    if isinstance(directory, RemotePath) or place.name not in trained_on:
        return False
    return digest_of_tokens(directory) == trained_on[place.name]


def _check_moved(place: _Place, output: str, display: Display) -> None:
    """Raises HymbaError if the text of tokens that were trained on is said to be another."""
    directory = resolve_path(place.directory)
    recorded = tokenize_records.recorded_path(directory)
    if (place.path or STANDARD_LIBRARY) == recorded:
        return
    files = _list_text(place, output, display) if place.path else standard_library(0).files
    if changed := tokenize_records.moved_difference(directory, files):
        raise HymbaError(
            f"{place.label}: {place.path or STANDARD_LIBRARY} is not {recorded}, on whose tokens "
            f"the run was trained ({changed}): name that again, which is not read, or choose "
            "another output"
        )


def _check_trained_on(place: _Place, output: str, trained_on: Mapping[str, str]) -> None:
    """Raises HymbaError, and removes the tokens, if they are not those that were trained on."""
    directory = resolve_path(place.directory)
    digest = digest_of_tokens(directory)
    if trained_on.get(place.name, digest) != digest:
        shutil.rmtree(directory)
        raise HymbaError(
            f"{output}: the {place.name} has other tokens than those the run was trained on: "
            f"restore {place.path or 'the Python of then'}, or choose another output"
        )


def _without_exceptions(corpora: Sequence[Corpus], trained_on: frozenset[int]) -> list[Corpus]:
    """The same, none with a document that another one has for itself on both sides, or on another
    side than the rest.

    Args:
      trained_on: hashes of such documents of sources that are not read again.
    """
    every = trained_on.union(*(corpus.exceptions for corpus in corpora))
    return [
        replace(corpus, excluded=corpus.excluded | others)
        if 0 < corpus.validation_fraction < 1 and (others := every - corpus.exceptions)
        else corpus
        for corpus in corpora
    ]


def _list_text(place: _Place, output: str, display: Display) -> tuple[File, ...]:
    """The files of a source; none of the standard library, whose path is empty."""
    if not place.path:
        return ()
    listing = list_files(place.path, skip=[output])
    if listing.skipped:
        skipped = (f"{what}: {count:,}" for what, count in sorted(listing.skipped.items()))
        display.say(f"{place.path}: left out of the text: {', '.join(skipped)}")
    return listing.files


def _corpus(
    place: _Place,
    files: tuple[File, ...],
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """The corpus of a source; one of conversations takes the tokenizer that renders them."""
    if not place.path:
        return standard_library(place.held_out)
    return Corpus(
        path=place.path,
        files=files,
        content=make_content(
            config.format_of(place.source),
            place.source.text_field or config.text_field,
            config.loss_on,
            tokenizer,
            config.chat_template or "the tokenizer of the run",
        ),
        on_bad_record=config.on_bad_record,
        validation_fraction=place.held_out,
    )


def _given_tokenizer(config: DataConfig, places: list[_Place]) -> Tokenizer | None:
    """The tokenizer that has not to be trained: of tokens, or by its name; None if there is none.

    Raises:
      HymbaError: it would be trained, but there are tokens that do not say what made them.
    """
    own = {
        place.path: Tokenizer.load(directory)
        for place in places
        if not place.is_text and (directory := place.tokenized)
    }
    if own:
        _check_named_tokenizer(config, *next(iter(own.items())))
        return _first_for_chat([*own.values()]).with_chat_template_of(config.chat_template)
    if config.bpe_size is None:
        given = build_tokenizer(config.tokenizer, ())
        return given.with_chat_template_of(config.chat_template)
    if foreign := next((place for place in places if not place.is_text), None):
        raise HymbaError(
            f"{foreign.path}: does not say what made its tokens: set data.tokenizer to the path of "
            "that tokenizer"
        )
    return None


def _check_named_tokenizer(config: DataConfig, path: str, own: Tokenizer) -> None:
    """Raises HymbaError if the config names a tokenizer, rather than the size of a BPE to train,
    and tokens were made by another one."""
    if config.bpe_size is not None:
        return
    named = build_tokenizer(config.tokenizer, ())
    if named.text_fingerprint != own.text_fingerprint:
        raise HymbaError(
            f"{path}: was tokenized by another tokenizer than data.tokenizer {config.tokenizer}: "
            f"tokenize it with that one, or set data.tokenizer to {path}"
        )


def _first_for_chat(tokenizers: Sequence[Tokenizer]) -> Tokenizer:
    """The first that has a chat template; the first of all if none has."""
    return next((each for each in tokenizers if each.chat_templates), tokenizers[0])


# --- By every process ---


def open_sources(config: DataConfig, tokenizer: Tokenizer | None, output: str) -> Sources:
    """Opens all sources; those that are text are tokenized by then.

    Args:
      tokenizer: that of the run, if it has one already.

    Raises:
      HymbaError: tokens are damaged, of different tokenizers, or there are none on one side.
    """
    places = [*_places(config, output)]
    _check_places([place for *_, place in places])
    tokenized = {
        place.directory: TokenizedCorpus.open(place.tokenized)
        for _, _, place in places
        if place.tokenized is not None
    }
    if tokenizer is None:
        tokenizer = _given_tokenizer(config, [place for *_, place in places])
    if tokenizer is None:
        own = [corpus.tokenizer for corpus in tokenized.values()]
        tokenizer = _first_for_chat(own).with_chat_template_of(config.chat_template)
    train: dict[str, Tokens] = {}
    validation: dict[str, Tokens] = {}
    notes = []
    for is_training, name, place in places:
        if place.tokenized is None:
            (train if is_training else validation)[name] = _open_files(place, tokenizer, config)
            continue
        corpus = tokenized[place.directory]
        _check_tokenizer(place, corpus, tokenizer)
        _check_format(place, corpus, config)
        sides = _sides(corpus)
        if is_training:
            train[name] = _train_side(place, sides)
            if not config.validation and VALIDATION in sides:
                validation[name] = sides[VALIDATION]
        else:
            validation[name] = _whole(place, corpus)
        if not place.is_text:
            kept = (
                "tokenizer is used"
                if config.validation
                else "tokenizer and validation documents are used"
            )
            notes.append(f"{place.path}: is tokenized: its {kept}")
    if not validation:
        names = ", ".join(place.path or "the standard library" for *_, place in places)
        raise HymbaError(
            f"{names}: no validation documents: name some in [data.validation.NAME], or hold out a "
            "larger validation_fraction of text"
        )
    if not config.validation:
        notes += [
            f"{place.path or name}: has no held-out documents, so validation is without it"
            for is_training, name, place in places
            if is_training and name not in validation
        ]
    notes += _shared_documents(config, places, tokenized)
    notes += _without_effect(config, [place for *_, place in places])
    return Sources(tokenizer, train, validation, tuple(notes))


def _check_places(places: Sequence[_Place]) -> None:
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


def _check_tokens(place: _Place, tokenizer: Tokenizer, config: DataConfig) -> None:
    """Raises HymbaError if a source that is tokens cannot be used: before text is tokenized."""
    if place.tokenized is None:
        _open_files(place, tokenizer, config)
        return
    corpus = TokenizedCorpus.open(place.tokenized)
    _check_tokenizer(place, corpus, tokenizer)
    _check_format(place, corpus, config)


def _shared_documents(
    config: DataConfig,
    places: Sequence[tuple[bool, str, _Place]],
    tokenized: Mapping[Location, TokenizedCorpus],
) -> Iterator[str]:
    """Says where documents may be on both sides of the split, which only text is searched for."""

    def excludes(place: _Place) -> bool:
        """Whether a tokenized corpus is without some text that was named with `--data.exclude`."""
        corpus = tokenized.get(place.directory)
        return corpus is not None and "excluded documents" in corpus.manifest.options

    train = [place for is_training, _, place in places if is_training]
    held_out = [place for is_training, _, place in places if not is_training]
    if all(place.is_text for place in held_out):
        unsure = [place.label for place in train if not (place.is_text or excludes(place))]
    else:
        unsure = [place.label for place in train if place.is_text or not excludes(place)]
    if held_out and unsure:
        names = ", ".join(place.label for place in held_out)
        yield (
            f"{', '.join(unsure)}: not searched for documents of {names}, as what is tokenized is "
            "not read again: hymba tokenize --data.exclude leaves them out"
        )
    if held_out or not unsure or len(train) < 2:
        return
    shares = {
        tokenized[place.directory].manifest.options["validation_fraction"]
        if place.directory in tokenized
        else 0.0
        for place in train
    }
    if len(shares) > 1:
        yield (
            f"{', '.join(place.label for place in train)}: hold out different shares: a document "
            "of several may be trained on and validated with: tokenize them with one "
            "validation_fraction"
        )


def _without_effect(config: DataConfig, places: Sequence[_Place]) -> Iterator[str]:
    """Says which options of text are set where there is none."""
    names = ["validation_fraction"] * bool(config.validation)
    if not any(place.is_text for place in places):
        names = ["text_field", "on_bad_record", "validation_fraction"]
    for name in names:
        if getattr(config, name) != getattr(DataConfig, name):
            yield f"data.{name}: has no effect on these sources"


def _open_files(place: _Place, tokenizer: Tokenizer, config: DataConfig) -> Tokens:
    if config.has_answers(place.source):
        raise HymbaError(f"{place.path}: {_other_format(place, 'text', config)}")
    files = place.token_files
    store = open_tokens(
        files, place.source.token_dtype or None, tokenizer.eos_id, tokenizer.vocab_size
    )
    return Tokens(store, digest_of(files))


def _sides(corpus: TokenizedCorpus) -> dict[str, Tokens]:
    """The sides of a tokenized corpus that have documents."""
    return {
        side: Tokens(
            store,
            corpus.digest,
            getattr(corpus.manifest, side).text_bytes,
            corpus.format == "preference",
        )
        for side in SIDES
        if (store := getattr(corpus, side)) is not None
    }


def _whole(place: _Place, corpus: TokenizedCorpus) -> Tokens:
    """All documents of a tokenized corpus."""
    store, manifest = corpus.whole(), corpus.manifest
    if store is None:
        raise HymbaError(f"{place.path}: {place.label} has no documents: name one that has some")
    return Tokens(
        store,
        corpus.digest,
        manifest.train.text_bytes + manifest.validation.text_bytes,
        corpus.format == "preference",
    )


def _train_side(place: _Place, sides: dict[str, Tokens]) -> Tokens:
    if TRAIN not in sides:
        raise HymbaError(
            f"{place.path or 'standard library'}: {place.label} leaves no document to train on: "
            "add some that are not held out for validation"
        )
    return sides[TRAIN]


def _check_tokenizer(place: _Place, corpus: TokenizedCorpus, tokenizer: Tokenizer) -> None:
    own = corpus.tokenizer
    if own.text_fingerprint != tokenizer.text_fingerprint:
        raise HymbaError(
            f"{place.path}: was tokenized by another tokenizer than the run's: tokenize it with "
            "that one, or set data.tokenizer to this directory and start from scratch"
        )
    if corpus.format != "text" and own.fingerprint != tokenizer.fingerprint:
        raise HymbaError(
            f"{place.path}: was tokenized with another chat template than the run's: tokenize it "
            "with that one, or leave out data.chat_template"
        )


def _check_format(place: _Place, corpus: TokenizedCorpus, config: DataConfig) -> None:
    """Raises HymbaError unless tokens have the loss where the config has it."""
    # What text says of itself is the default, which is not to be set for what is tokenized.
    if config.has_answers(place.source) and corpus.format != config.format_of(place.source):
        raise HymbaError(f"{place.path}: {_other_format(place, corpus.format, config)}")
    loss_on = corpus.manifest.options.get("loss_on", config.loss_on)
    if loss_on != config.loss_on:
        raise HymbaError(
            f'{place.path}: was tokenized with loss_on "{loss_on}", data.loss_on is '
            f'"{config.loss_on}": set it to the same, or tokenize again'
        )


def _other_format(place: _Place, found: str, config: DataConfig) -> str:
    lacks = ", which does not say where answers are" if found == "text" else ""
    return (
        f"was tokenized as {found}{lacks}: tokenize it again with --data.format "
        f'{config.format_of(place.source)}, or set the format of {place.label} to "{found}"'
    )
