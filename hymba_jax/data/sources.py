"""The sources of a run: text, which is tokenized once into the run directory, or tokens.

One process calls `tokenize_sources`; then all processes open the same tokens.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from hymba_jax.config.data import DataConfig, SourceConfig
from hymba_jax.data import tokenize_records
from hymba_jax.data.content import make_content
from hymba_jax.data.corpus import Corpus, document_hashes, standard_library
from hymba_jax.data.listing import File, is_url, list_files
from hymba_jax.data.manifest import MANIFEST, SIDES, TRAIN, VALIDATION
from hymba_jax.data.token_files import digest_of, find_token_files
from hymba_jax.data.token_store import TokenStore, open_tokens
from hymba_jax.data.tokenize_corpus import tokenize_corpus
from hymba_jax.data.tokenize_progress import with_progress
from hymba_jax.data.tokenized import TokenizedCorpus, is_tokenized
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
      label: what messages call it.
      source: of the config.
      held_out: share of the documents that are for validation, if it is text.
      directory: for its tokens, if it is text.
    """

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
            yield True, name, _Place(label, source, held_out, root / "train" / name)
    for name, held_out_source in config.validation.items():
        place = _Place(f"data.validation.{name}", held_out_source, 1.0, root / "validation" / name)
        yield False, name, place


# --- By one process: text to tokens ---


def tokenize_sources(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    output: str,
    check: Callable[[Tokenizer], object],
    display: Display,
    *,
    is_resumed: bool,
) -> None:
    """Tokenizes every source that is text into the run directory, unless it is there already.

    What was interrupted continues. Tokens of other text or options are removed, unless a checkpoint
    depends on them: a run that is resumed has its own tokens, and reads the text of new sources
    only.

    Args:
      tokenizer: that of the run, if it has one already; else that of the sources that are tokens
        or, if all are text, what `config` asks for: a BPE is trained on their training documents.
      output: the run directory, which is no part of a source.
      check: raises HymbaError if the run cannot use a tokenizer, before anything is written.
      is_resumed: whether the run has a checkpoint.

    Raises:
      HymbaError: a source or the tokenizer is unusable, or they do not go together.
    """
    places = [place for _, _, place in _places(config, output)]
    text_sources = [place for place in places if place.is_text]
    held_out = [place for place in text_sources if place.is_held_out]
    if is_resumed:
        done = [place for place in text_sources if (place.directory / MANIFEST).exists()]
        text_sources = [place for place in text_sources if place not in done]
        if done:
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
        return [
            corpus if place.is_held_out else replace(corpus, excluded=hashes)
            for place, corpus in of(text_sources)
        ]

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
    for place, corpus in zip(text_sources, corpora(tokenizer), strict=True):
        directory = resolve_path(place.directory)
        options = {"data.path": corpus.path, **corpus.options, "tokenizer": tokenizer.fingerprint}
        if tokenize_records.difference(directory, options, corpus.files):
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tokenize_records.begin(directory, options, corpus.files)
        tokenizer.save(directory)
        display.begin(f"tokenizing {corpus.path}")
        manifest = tokenize_corpus(corpus, tokenizer, directory, display)
        if manifest and manifest.skipped:
            display.say(
                f"{corpus.path}: skipped {manifest.skipped:,} records, listed in "
                f"{directory / tokenize_records.UNITS}/*.skipped.jsonl"
            )


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
    tokenized = [place.tokenized for place in places if not place.is_text]
    if own := [Tokenizer.load(directory) for directory in tokenized if directory]:
        return _first_for_chat(own).with_chat_template_of(config.chat_template)
    if config.bpe_size is None:
        given = build_tokenizer(config.tokenizer, ())
        return given.with_chat_template_of(config.chat_template)
    if foreign := next((place for place in places if not place.is_text), None):
        raise HymbaError(
            f"{foreign.path}: does not say what made its tokens: set data.tokenizer to the path of "
            "that tokenizer"
        )
    return None


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
    tokenized = {
        place.directory: TokenizedCorpus.open(place.tokenized)
        for _, _, place in places
        if place.tokenized is not None
    }
    if tokenizer is None:
        own = [corpus.tokenizer for corpus in tokenized.values()]
        tokenizer = (
            _first_for_chat(own).with_chat_template_of(config.chat_template)
            if own
            else _given_tokenizer(config, [place for *_, place in places])
        )
    assert tokenizer is not None  # else there was text, which is tokenized
    train: dict[str, Tokens] = {}
    validation: dict[str, Tokens] = {}
    notes = []
    for is_training, name, place in places:
        if place.tokenized is None:
            if config.has_answers(place.source):
                raise HymbaError(f"{place.path}: {_other_format(place, 'text', config)}")
            (train if is_training else validation)[name] = _open_files(place, tokenizer)
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
            validation[name] = sides.get(VALIDATION) or _train_side(place, sides)
        if not place.is_text:
            kept = "tokenizer" if config.validation else "tokenizer and validation documents"
            notes.append(f"{place.path}: is tokenized: its {kept} are used")
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
    return Sources(tokenizer, train, validation, tuple(notes))


def _open_files(place: _Place, tokenizer: Tokenizer) -> Tokens:
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
