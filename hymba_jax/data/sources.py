"""The sources of a run, opened by every process: tokens, as text is tokenized by then, or tasks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hymba_jax.config.data import DataConfig
from hymba_jax.data.manifest import SIDES, TRAIN, VALIDATION
from hymba_jax.data.places import Place, check_places, read_places
from hymba_jax.data.recall_rows import RecallSource
from hymba_jax.data.token_files import digest_of
from hymba_jax.data.token_store import TokenStore, open_tokens
from hymba_jax.data.tokenized import TokenizedCorpus
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location
from hymba_jax.tokenizer import Tokenizer, build_tokenizer


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


type Source = Tokens | RecallSource
"""A source once it is opened."""


@dataclass(frozen=True)
class Sources:
    """All sources of a run, opened, by name.

    Attributes:
      tokenizer: what made the tokens.
      notes: what a user should know of them, a line each.
    """

    tokenizer: Tokenizer
    train: dict[str, Source]
    validation: dict[str, Source]
    notes: tuple[str, ...]


def given_tokenizer(config: DataConfig, places: list[Place]) -> Tokenizer | None:
    """The tokenizer that has not to be trained: of tokens, or by its name; None if there is none.

    Raises:
      HymbaError: it would be trained, but there are tokens that do not say what made them, or no
        source of training is text.
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
    if foreign := next((place for place in places if not (place.is_text or place.task)), None):
        raise HymbaError(
            f"{foreign.path}: does not say what made its tokens: set data.tokenizer to the path of "
            "that tokenizer"
        )
    train = (place for place in places if place.is_text and not place.is_held_out)
    if all(config.has_answers(place.source) for place in train):
        raise HymbaError(
            f"data.tokenizer {config.tokenizer} is trained on text, and no source of training is "
            "text: name a tokenizer, or start from a model with init_from"
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


def open_sources(config: DataConfig, tokenizer: Tokenizer | None, output: str) -> Sources:
    """Opens all sources; those that are text are tokenized by then.

    Args:
      tokenizer: that of the run, if it has one already.

    Raises:
      HymbaError: tokens are damaged, of different tokenizers, or there are none on one side.
    """
    places = [*read_places(config, output)]
    check_places([place for *_, place in places])
    tokenized = {
        place.directory: TokenizedCorpus.open(place.tokenized)
        for _, _, place in places
        if place.tokenized is not None
    }
    if tokenizer is None:
        tokenizer = given_tokenizer(config, [place for *_, place in places])
    if tokenizer is None:
        own = [corpus.tokenizer for corpus in tokenized.values()]
        tokenizer = _first_for_chat(own).with_chat_template_of(config.chat_template)
    train: dict[str, Source] = {}
    validation: dict[str, Source] = {}
    notes = []
    for is_training, name, place in places:
        if place.tokenized is None:
            source = _open_other(place, tokenizer, config)
            (train if is_training else validation)[name] = source
            if isinstance(source, RecallSource):
                notes.append(f"{place.label}: is generated: {source.num_rows:,} sequences")
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


def check_tokens(place: Place, tokenizer: Tokenizer, config: DataConfig) -> None:
    """Raises HymbaError if a source that is tokens cannot be used: before text is tokenized."""
    if place.tokenized is None:
        _open_other(place, tokenizer, config)
        return
    corpus = TokenizedCorpus.open(place.tokenized)
    _check_tokenizer(place, corpus, tokenizer)
    _check_format(place, corpus, config)


def _shared_documents(
    config: DataConfig,
    places: Sequence[tuple[bool, str, Place]],
    tokenized: Mapping[Location, TokenizedCorpus],
) -> Iterator[str]:
    """Says where documents may be on both sides of the split, which only text is searched for."""

    def excludes(place: Place) -> bool:
        """Whether a tokenized corpus is without some text that was named with `--data.exclude`."""
        corpus = tokenized.get(place.directory)
        return corpus is not None and "excluded documents" in corpus.manifest.options

    documents = [(is_training, place) for is_training, _, place in places if not place.task]
    train = [place for is_training, place in documents if is_training]
    held_out = [place for is_training, place in documents if not is_training]
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
    if config.validation or not unsure or len(train) < 2:
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


def _without_effect(config: DataConfig, places: Sequence[Place]) -> Iterator[str]:
    """Says which options of text are set where there is none."""
    names = ["validation_fraction"] * bool(config.validation)
    if not any(place.is_text for place in places):
        names = ["text_field", "on_bad_record", "validation_fraction"]
    for name in names:
        if getattr(config, name) != getattr(DataConfig, name):
            yield f"data.{name}: has no effect on these sources"


def _open_other(place: Place, tokenizer: Tokenizer, config: DataConfig) -> Source:
    """Opens what is no tokenized corpus: a task, or files of tokens."""
    if place.task:
        if place.task.vocab_size > tokenizer.vocab_size:
            raise HymbaError(
                f"{place.label}: {place.path} has a vocabulary of {place.task.vocab_size} tokens, "
                f"the tokenizer has {tokenizer.vocab_size}: choose a smaller vocabulary, or "
                "another data.tokenizer"
            )
        return RecallSource(place.task, place.is_held_out, place.label)
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


def _whole(place: Place, corpus: TokenizedCorpus) -> Tokens:
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


def _train_side(place: Place, sides: dict[str, Tokens]) -> Tokens:
    if TRAIN not in sides:
        raise HymbaError(
            f"{place.path or 'standard library'}: {place.label} leaves no document to train on: "
            "add some that are not held out for validation"
        )
    return sides[TRAIN]


def _check_tokenizer(place: Place, corpus: TokenizedCorpus, tokenizer: Tokenizer) -> None:
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


def _check_format(place: Place, corpus: TokenizedCorpus, config: DataConfig) -> None:
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


def _other_format(place: Place, found: str, config: DataConfig) -> str:
    lacks = ", which does not say where answers are" if found == "text" else ""
    return (
        f"was tokenized as {found}{lacks}: tokenize it again with --data.format "
        f'{config.format_of(place.source)}, or set the format of {place.label} to "{found}"'
    )
