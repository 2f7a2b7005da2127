"""`hymba tokenize`: a corpus to shards of tokens, on all cores, of one host or of several."""

import dataclasses
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hymba_jax.config.data import DataConfig, Format, LossOn, OnBadRecord, is_generated
from hymba_jax.config.field_types import Bounds, bound_problems, type_problems
from hymba_jax.data import tokenize_records
from hymba_jax.data.content import make_content
from hymba_jax.data.corpus import Corpus, document_hashes
from hymba_jax.data.listing import File, list_files
from hymba_jax.data.manifest import MANIFEST, SIDES, Manifest
from hymba_jax.data.show_examples import examples
from hymba_jax.data.tokenize_corpus import one_line_full_disk, tokenize_corpus
from hymba_jax.data.tokenize_progress import with_progress
from hymba_jax.data.tokenized import TokenizedCorpus, damage
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.file_lock import check_unlocked, locked
from hymba_jax.files import resolve_path
from hymba_jax.tokenizer import Tokenizer, build_tokenizer

TOKENIZE_BOUNDS = {
    "workers": Bounds(0, 1024, "no host has so many cores"),
    "show": Bounds(0, 10_000, "nobody reads so many"),
}

_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_PART = re.compile(r"\d{1,6}/\d{1,6}")


@dataclass(frozen=True)
class TokenizeDataConfig:
    """Where the text comes from.

    Attributes:
      path: a file, a directory or a glob of text, JSON or Parquet files, compressed or not; local
        or a URL such as gs://bucket/directory.
      format: whether records are text; conversations (`chat`): `messages`, `conversations`, or
        `prompt` and `completion`, with the loss on answers alone; or pairs of them (`preference`):
        `prompt`, `chosen` and `rejected`.
      loss_on: whether the loss of a conversation is on all of its answers, or on the last one;
        those before the prompt of a pair are never in it.
      text_field: field of a JSON object, or column of Parquet, that holds the document.
      on_bad_record: whether a bad record is an error or skipped, and listed in the output.
      validation_fraction: about this share of the documents, chosen by a hash of their text, is
        held out for validation.
      exclude: paths, as `path`, of text that is for validation or evaluation: documents that are
        also there are skipped, and listed in the output.
    """

    path: str = ""
    format: Format = "text"
    loss_on: LossOn = "all"
    text_field: str = "text"
    on_bad_record: OnBadRecord = "stop"
    validation_fraction: float = 0.05
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizeConfig:
    """Tokenizes a corpus once, for any number of training runs.

    An interrupted command resumes when it runs again.

    Attributes:
      output: local directory for the shards, the tokenizer and a manifest; in a bucket there are
        no locks and renames, so copy it there when it is complete.
      data: where the text comes from.
      tokenizer: bytes, bpe:SIZE (trained on the training documents), or the path of a
        tokenizer.json or of a directory that holds one.
      chat_template: file of a chat template in Jinja, in place of the tokenizer's own.
      workers: processes that tokenize; 0: one for each core.
      part: i/n tokenizes part i of n, each of which may run on another host with the same output.
      tokenizer_only: trains and saves the tokenizer, and tokenizes nothing.
      check: reads all of a tokenized corpus and compares it with its checksums.
      show: prints this many of the documents, or pairs of them, with what the loss is on in
        brackets and in color.

    Raises:
      HymbaError: an option is missing or impossible.
    """

    output: str
    data: TokenizeDataConfig = field(default_factory=TokenizeDataConfig)
    tokenizer: str = ""
    chat_template: str = ""
    workers: int = 0
    part: str = "1/1"
    tokenizer_only: bool = False
    check: bool = False
    show: int = 0

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._value_problems()]
        if problems:
            raise HymbaError("; ".join(problems))

    def _value_problems(self) -> Iterator[str]:
        yield from bound_problems(self, TOKENIZE_BOUNDS)
        if not self.output:
            yield "output is empty"
        if not self.check and not self.data.path:
            yield "data.path is missing: give a file, a directory or a glob"
        if is_generated(self.data.path):
            yield f"data.path {self.data.path} is generated: name it as a source of a run"
        if not self.check and not self.tokenizer:
            yield "tokenizer is missing: give bytes, bpe:SIZE or the path of a tokenizer.json"
        if self.data.format != "text" and self.bpe_size is not None:
            yield (
                f"tokenizer {self.tokenizer} is trained on text, which data.format "
                f"{self.data.format} is not: train one on text first, with --tokenizer-only and "
                "data.format text, and name its output"
            )
        if self.data.loss_on != "all" and self.data.format == "text":
            yield "data.loss_on has no effect on text: set data.format to chat, or leave it out"
        if self.show and self.tokenizer_only:
            yield "show has no effect with tokenizer_only, which tokenizes nothing"
        if not self.data.text_field:
            yield "data.text_field is empty"
        if self.data.text_field != TokenizeDataConfig.text_field and self.data.format != "text":
            yield f"data.text_field has no effect on data.format {self.data.format}: leave it out"
        if self.check:
            yield from self._unchecked()
        if not 0 <= self.data.validation_fraction < 1:
            yield f"data.validation_fraction is {self.data.validation_fraction}, not in [0, 1)"
        if not (_PART.fullmatch(self.part) and 0 <= self.part_of[0] < self.part_of[1]):
            yield f"part is {self.part!r}: give i/n with i from 1 to n, such as 1/4"

    def _unchecked(self) -> Iterator[str]:
        """Options that are set, and have no effect with `check`."""
        for each in dataclasses.fields(self):
            default = TokenizeDataConfig() if each.name == "data" else each.default
            if each.name not in ("output", "check") and getattr(self, each.name) != default:
                yield f"{each.name} has no effect with check, which reads what is in output"

    @property
    def bpe_size(self) -> int | None:
        """As of `DataConfig`."""
        return DataConfig(tokenizer=self.tokenizer or "bytes").bpe_size

    @property
    def part_of(self) -> tuple[int, int]:
        """The part, from 0, and how many parts there are."""
        part, parts = self.part.split("/")
        return int(part) - 1, int(parts)


def main(config: TokenizeConfig) -> None:
    """Tokenizes a corpus, or checks one.

    Raises:
      HymbaError: the corpus, the tokenizer or the directory cannot be used, or is damaged.
    """
    directory = resolve_path(config.output)
    if config.check:
        _check(directory)
        return
    with (
        _one_line_signals(directory),
        Display() as display,
        one_line_full_disk(directory),
        _locked_part(directory, config.part_of, display),
    ):
        _tokenize(config, directory, display)


def _tokenize(config: TokenizeConfig, directory: Path, display: Display) -> None:
    data = config.data
    display.begin("listing the files")
    listing = list_files(data.path, skip=[directory])
    given = None
    if config.bpe_size is None:
        given = build_tokenizer(config.tokenizer, ()).with_chat_template_of(config.chat_template)
    corpus = _corpus(config, listing.files, given, directory, display)
    options = {"data.path": data.path, **corpus.options, "tokenizer": config.tokenizer}
    tokenize_records.begin(directory, options, listing.files)
    tokenizer = _prepare_tokenizer(config, given, corpus, directory, display)
    if config.tokenizer_only:
        display.say(f"{directory}: has the tokenizer, of {tokenizer.vocab_size:,} tokens")
        return
    part, parts = config.part_of
    if (directory / MANIFEST).exists():
        display.say(f"{directory}: was tokenized already")
    manifest = tokenize_corpus(
        corpus, tokenizer, directory, display, workers=config.workers, part=part, parts=parts
    )
    if manifest is None:
        done, total = tokenize_records.count_done(directory) or (0, 0)
        left = total - done
        display.say(f"{directory}: part {config.part} is done, {left} groups of files are not yet")
        return
    _summarize(manifest, directory, display)
    for what, count in sorted(listing.skipped.items()):
        display.say(f"skipped {what}: {count:,}")
    if not manifest.train.documents + manifest.validation.documents:
        why = "all are skipped" if manifest.skipped else "all of its text is empty"
        raise HymbaError(f"{data.path}: has no documents, {why}")
    for example in examples(TokenizedCorpus.open(directory), config.show):
        display.say(example)


def _corpus(
    config: TokenizeConfig,
    files: tuple[File, ...],
    tokenizer: Tokenizer | None,
    directory: Path,
    display: Display,
) -> Corpus:
    """The corpus; one of conversations takes the tokenizer that renders them.

    Args:
      directory: of the output, which is no text to exclude.
    """
    data = config.data
    template = config.chat_template or config.tokenizer
    corpus = Corpus(
        path=data.path,
        files=files,
        content=make_content(data.format, data.text_field, data.loss_on, tokenizer, template),
        on_bad_record=data.on_bad_record,
        validation_fraction=data.validation_fraction,
    )
    if not data.exclude:
        return corpus
    display.begin("reading the documents to exclude")
    excluded = (
        dataclasses.replace(corpus, path=path, files=list_files(path, skip=[directory]).files)
        for path in data.exclude
    )
    return dataclasses.replace(corpus, excluded=document_hashes(excluded))


def _prepare_tokenizer(
    config: TokenizeConfig,
    given: Tokenizer | None,
    corpus: Corpus,
    directory: Path,
    display: Display,
) -> Tokenizer:
    """The tokenizer in the directory, which is put there if it is not there yet.

    Args:
      given: what to put there; None if it has to be trained.
    """
    name, parts = config.tokenizer, config.part_of[1]
    is_there = (directory / "tokenizer.json").exists()
    if is_there and given is None:
        trained = Tokenizer.load(directory)
        if trained.with_chat_template_of(config.chat_template).fingerprint != trained.fingerprint:
            raise HymbaError(
                f"{directory}: was begun with another chat template than {config.chat_template}: "
                "leave --chat-template out, or give another --output"
            )
        return trained
    if given is not None:
        if is_there and Tokenizer.load(directory).fingerprint != given.fingerprint:
            raise HymbaError(
                f"{directory}: was begun with another tokenizer than {name} is now: give the same "
                "again, or another --output"
            )
    elif parts > 1:
        raise HymbaError(
            f"--part: each part would train {name}: train it once, with --tokenizer-only and "
            "without --part"
        )
    else:
        trained = build_tokenizer(name, with_progress(corpus.training_texts(), display))
        given = trained.with_chat_template_of(config.chat_template)
    given.save(directory)
    return Tokenizer.load(directory)


def _summarize(manifest: Manifest, directory: Path, display: Display) -> None:
    for name in SIDES:
        side = getattr(manifest, name)
        display.say(
            f"{name}: {side.documents:,} documents, {side.tokens:,} tokens, {side.text_bytes:,} "
            f"bytes of text, {len(side.shards)} shards"
        )
    for side, what in ((manifest.train, "train on"), (manifest.validation, "validate with")):
        if not side.documents and manifest.options["validation_fraction"]:
            display.say(f"no document is left to {what}: tokenize more of them together")
    if manifest.skipped:
        display.say(
            f"skipped records: {manifest.skipped:,}, listed in "
            f"{directory / tokenize_records.UNITS}/*.skipped.jsonl"
        )


def _check(directory: Path) -> None:
    with Display() as display:
        display.begin(f"checking {directory}")
        count = 0
        for line in damage(directory):
            display.say(line)
            count += 1
        if count:
            raise HymbaError(f"{directory}: damaged in {count} places")
        display.say(f"{directory}: no damage")


@contextmanager
def _locked_part(directory: Path, part_of: tuple[int, int], display: Display) -> Iterator[None]:
    """Keeps others from tokenizing the same files into the directory.

    Raises:
      HymbaError: somebody does, of the same part or of parts of another number.
    """
    part, parts = part_of
    name = f"part-{part + 1}-of-{parts}.lock"
    with locked(directory / name, "`hymba tokenize` of the same part", display.say):
        for path in directory.glob("part-*-of-*.lock"):
            if not path.name.endswith(f"-of-{parts}.lock"):
                check_unlocked(path, "`hymba tokenize` with another number of parts")
        yield


class _Stopped(KeyboardInterrupt):
    """A signal has come, of the number that it has as its argument."""


@contextmanager
def _one_line_signals(directory: Path) -> Iterator[None]:
    """Ends the body at Ctrl-C or SIGTERM, says how to continue, and exits with 128 + signal.

    What is ignored, as in a shell's background, stays ignored.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise _Stopped(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    handled = [number for number in _SIGNALS if before[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    except _Stopped as stopped:
        (number,) = stopped.args
        sys.stderr.write(
            f"stopped by {_SIGNALS[number]}: run the same command again to continue in "
            f"{directory}\n"
        )
        sys.exit(128 + number)
    finally:
        for number in handled:
            signal.signal(number, before[number] or signal.SIG_DFL)  # None: set by no Python code
