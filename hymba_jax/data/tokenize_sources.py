"""The sources of a run that are text, tokenized once into the run directory, by one process."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from types import MappingProxyType

from hymba_jax.config.data import DataConfig
from hymba_jax.data import tokenize_records
from hymba_jax.data.content import make_content
from hymba_jax.data.corpus import STANDARD_LIBRARY, Corpus, document_hashes, standard_library
from hymba_jax.data.listing import File, list_files
from hymba_jax.data.places import TOKENS, Place, check_places, read_places
from hymba_jax.data.sources import check_tokens, given_tokenizer
from hymba_jax.data.tokenize_corpus import one_line_full_disk, tokenize_corpus
from hymba_jax.data.tokenize_progress import with_progress
from hymba_jax.data.tokenized import digest_of_tokens
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.files import resolve_location, resolve_path
from hymba_jax.remote import RemotePath
from hymba_jax.tokenizer import Tokenizer, build_tokenizer


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

    Resumes where it was stopped. Tokens of other text or options are removed, unless a checkpoint
    depends on them: then their text is not tokenized, and may have moved, but is no other. That of
    validation is still read where there is a new source, which is without its documents.

    Args:
      tokenizer: that of the run, if it has one already; else that of the sources that are tokens
        or, if all are text, what `config` asks for: a BPE is trained on their training documents.
      output: the run directory, which is no part of a source.
      check: raises HymbaError if the run cannot use a tokenizer, before anything is written.
      trained_on: `Data.digests` of the newest checkpoint.

    Raises:
      HymbaError: a source or the tokenizer is unusable, or they do not go together.
    """
    places = [place for _, _, place in read_places(config, output)]
    check_places(places)
    text_sources = [place for place in places if place.is_text]
    held_out = [place for place in text_sources if place.is_held_out]
    done = [place for place in text_sources if _is_trained_on(place, trained_on)]
    for place in done:
        _check_moved(place, output, display)
    if done:
        text_sources = [place for place in text_sources if place not in done]
        names = ", ".join(place.label for place in done)
        display.say(f"{names}: the run has the tokens, no text is tokenized")
        _say_not_searched(done, text_sources, display)
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

        def of(places: Iterable[Place]) -> list[tuple[Place, Corpus]]:
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

    tokenizer = tokenizer or given_tokenizer(config, places)
    if tokenizer is None:
        training = chain.from_iterable(corpus.training_texts() for corpus in corpora(None))
        trained = build_tokenizer(config.tokenizer, with_progress(training, display))
        tokenizer = trained.with_chat_template_of(config.chat_template)
    check(tokenizer)
    for place in places:
        if not place.is_text:
            check_tokens(place, tokenizer, config)
    with one_line_full_disk(root):
        for place, corpus in zip(text_sources, corpora(tokenizer), strict=True):
            _tokenize(place, corpus, tokenizer, display)
            _check_trained_on(place, output, trained_on)


def _tokenize(place: Place, corpus: Corpus, tokenizer: Tokenizer, display: Display) -> None:
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


def _is_trained_on(place: Place, trained_on: Mapping[str, str]) -> bool:
    """Whether the tokens of a source are there, and those of a checkpoint."""
    directory = resolve_location(place.directory)
    if isinstance(directory, RemotePath) or place.name not in trained_on:
        return False
    return digest_of_tokens(directory) == trained_on[place.name]


def _check_moved(place: Place, output: str, display: Display) -> None:
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


def _check_trained_on(place: Place, output: str, trained_on: Mapping[str, str]) -> None:
    """Raises HymbaError, and removes the tokens, if they are not those that were trained on."""
    directory = resolve_path(place.directory)
    digest = digest_of_tokens(directory)
    if trained_on.get(place.name, digest) != digest:
        shutil.rmtree(directory)
        raise HymbaError(
            f"{output}: the {place.name} has other tokens than those the run was trained on: "
            f"restore {place.path or 'the Python of then'}, or choose another output"
        )


def _say_not_searched(done: Sequence[Place], new: Sequence[Place], display: Display) -> None:
    """Says which new sources of validation may have documents that the run was trained on."""
    trained = ", ".join(place.label for place in done if not place.is_held_out)
    held_out = ", ".join(place.label for place in new if place.is_held_out)
    if trained and held_out:
        display.say(
            f"{held_out}: not searched for in {trained}, which the run has tokenized already: "
            "name documents that it was not trained on"
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


def _list_text(place: Place, output: str, display: Display) -> tuple[File, ...]:
    """The files of a source; none of the standard library, whose path is empty."""
    if not place.path:
        return ()
    listing = list_files(place.path, skip=[output])
    if listing.skipped:
        skipped = (f"{what}: {count:,}" for what, count in sorted(listing.skipped.items()))
        display.say(f"{place.path}: left out of the text: {', '.join(skipped)}")
    return listing.files


def _corpus(
    place: Place,
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
