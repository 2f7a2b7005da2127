"""Text to token ids and back: bytes, a byte-level BPE trained here, or any `tokenizer.json`.

All three are a `tokenizers.Tokenizer`, so they save, load and encode alike. Control tokens come
from ids and chat templates alone: text that looks like one ("<s>") is encoded as ordinary text.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from hymba_jax.config import HymbaConfig
from hymba_jax.config.data import DataConfig
from hymba_jax.config.field_types import shown
from hymba_jax.errors import HymbaError
from hymba_jax.files import Location, matches, read_json, read_text, replace_text, resolve_location
from hymba_jax.tokenizer.control_tokens import ControlTokens, marked_special, token_ids
from hymba_jax.types import Int

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

REPLACEMENT = "\ufffd"
"""What bytes that are not UTF-8 are decoded to."""

NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""The special tokens that a tokenizer_config.json names, and a chat template may use."""

_FALLBACK_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]  # of bytes, as of SentencePiece

_CUSTOMARY = {
    "bos_token": (BOS, "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos_token": (EOS, "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>"),
}

# GPT-4's split of text into words, with three changes. For source code: a line break takes the
# indentation after it along, and so does punctuation at the end of a line, so that "):\n        "
# can be one token. And a word has 256 characters at most (the longest in the standard library has
# 109), because a BPE's training takes time that grows with the square of a word's length. Letters
# never share a word with what follows them: text cannot merge into the name of a special token.
_WORD = (
    r"[^\r\n\p{L}\p{N}]?\p{L}{1,256}"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]{1,256}(?:[\r\n]{1,256}[ \t]{0,256})?"
    r"|\s{0,256}[\r\n]{1,256}[ \t]{0,256}"
    r"|\s{1,256}(?!\S)"
    r"|\s{1,256}"
)


class Tokenizer:
    """A vocabulary with an end-of-sequence (EOS) and, in most cases, a beginning-of-sequence token.

    Args:
      bos, eos: names of the tokens before and after each document.
      chat_template: how a conversation is written for the model, in Jinja; several by name are
        "default" and "tool_use", which is for conversations with tools.
      named_tokens: further special tokens that a chat template may use: {"pad_token": "<pad>"}.

    Attributes:
      model: the underlying `tokenizers.Tokenizer`.
      vocab_size: the largest token id plus one.
      bos_id, eos_id: ids of the tokens before and after each document.
      bos_ids: `[bos_id]`, or empty if there is none.
      special_tokens: the id of each special token, by name; omitted when decoding.
      control: the control tokens: the special ones, and all others that were added.
      chat_templates: by name.

    Raises:
      HymbaError: the tokenizers library cannot work with the model.
    """

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        bos: str | None,
        eos: str,
        chat_template: str | Mapping[str, str] | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        named = {**(named_tokens or {}), **({"bos_token": bos} if bos else {}), "eos_token": eos}
        with _one_line("the tokenizer failed"):
            # HF files may configure truncation or padding, or not mark special tokens.
            model.no_truncation()
            model.no_padding()
            model.add_special_tokens([marked_special(model, name) for name in named.values()])
            model.encode_special_tokens = False
            self.control = ControlTokens(model)
        self.model = model
        self.named_tokens = named
        self.bos, self.eos = bos, eos
        vocabulary = model.get_vocab()
        self.bos_id = None if bos is None else vocabulary[bos]
        self.eos_id = vocabulary[eos]
        self.bos_ids = [] if self.bos_id is None else [self.bos_id]
        self.vocab_size = max(vocabulary.values()) + 1
        added = model.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: number for number, token in added if token.special}
        names = {number: name for name, number in self.special_tokens.items()}
        self._token_texts: dict[int, str | None] = {**names}
        if isinstance(chat_template, str):
            chat_template = {"default": chat_template}
        self.chat_templates = dict(chat_template or {})

    @property
    def chat_template(self) -> str | None:
        """The template of conversations without tools; None if there is none."""
        return self.chat_templates.get("default")

    @cached_property
    def fingerprint(self) -> str:
        """A short digest of all that decides ids and chats; a copy that was saved has the same."""
        parts = [self.model.to_str(), self.bos, self.eos, self.chat_template]
        others = self.chat_templates.items() - {("default", self.chat_template)}
        return _digest([*parts, *sorted(others)])

    @cached_property
    def text_fingerprint(self) -> str:
        """A short digest of all that decides the ids of text, whatever the chat template."""
        return _digest([self.model.to_str(), self.bos, self.eos])

    @cached_property
    def text_tokens(self) -> frozenset[int]:
        """The tokens that have text: those of the vocabulary that are not special."""
        named = (i for i in range(self.vocab_size) if self.model.id_to_token(i) is not None)
        return frozenset(named) - {*self.special_tokens.values()}

    @cached_property
    def byte_tokens(self) -> dict[int, int]:
        """Byte-fallback tokens (as of SentencePiece) with their bytes; often empty.

        A run of them is decoded as UTF-8 if it is valid, else each byte becomes a replacement.
        """
        numbers = [self.model.token_to_id(name) for name in _FALLBACK_NAMES]
        probe = numbers[ord("A")]
        if probe is None or self.model.decode([probe]) != "A":
            return {}
        return {number: byte for byte, number in enumerate(numbers) if number is not None}

    def with_chat_template_of(self, path: str) -> "Tokenizer":
        """The same with the chat template in a file in place of its own; itself without a path.

        Raises:
          HymbaError: the file cannot be read.
        """
        if not path:
            return self
        template = read_text(resolve_location(path))
        return Tokenizer(self.model, self.bos, self.eos, template, self.named_tokens)

    def extends(self, other: "Tokenizer") -> bool:
        """Whether ordinary text has the ids that the other gives it; it may have more tokens."""
        missing = other.model.get_vocab().items() - self.model.get_vocab().items()
        return not missing and _tokenization(self) == _tokenization(other)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
          parse_special: whether the names of control tokens are these tokens, not ordinary text.

        Raises:
          HymbaError: it is not valid Unicode, or the tokenizer cannot encode it.
        """
        _check_text(text)
        model = self.model if parse_special else self.control.ordinary
        with _one_line("the tokenizer failed"):
            return token_ids(model, text)

    def encode_traced(self, text: str, origins: bytes) -> list[int]:
        """Token ids of `text` with the control tokens that a chat template wrote in it.

        Args:
          origins: who wrote each character, as `control_tokens.py` has it.

        Raises:
          HymbaError: it is not valid Unicode, or the tokenizer cannot encode it.
        """
        _check_text(text)
        with _one_line("the tokenizer failed"):
            return self.control.encode(text, origins)

    def encode_with_spans(
        self, text: str, origins: bytes
    ) -> tuple[list[int], Int[np.ndarray, "tokens 2"]]:
        """The ids of `encode_traced`, and where in the text each token starts and ends.

        Raises:
          HymbaError: it is not valid Unicode, or the tokenizer cannot encode it.
        """
        _check_text(text)
        with _one_line("the tokenizer failed"):
            return self.control.encode_with_spans(text, origins)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, all of it ordinary text, on all processor cores.

        Raises:
          HymbaError: the tokenizer cannot encode them.
        """
        with _one_line("the tokenizer failed"):
            model = self.control.ordinary
            encodings = model.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out.

        Raises:
          HymbaError: the tokenizer cannot decode them.
        """
        with _one_line("the tokenizer failed"):
            return str(self.model.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token: int) -> str | None:
        """What a token adds to a text that it is in the middle of; the name of a special token.

        None if that is not text, such as the first bytes of a character.
        """
        if token not in self._token_texts:
            # Alone, tokens of SentencePiece would lose the blank that they begin with.
            before = self.encode("a")
            text, start = self.decode([*before, token]), self.decode(before)
            text = text[len(start) :] if text.startswith(start) else self.decode([token])
            self._token_texts[token] = text if text and REPLACEMENT not in text else None
        return self._token_texts[token]

    def token_bytes(self, token: int) -> bytes | None:
        """What a token adds to a text, in UTF-8: of a part of a character its own bytes.

        None if the tokenizer does not name bytes, or the token is not in its vocabulary.
        """
        text = self.token_text(token)
        if text is not None:
            return text.encode()
        name = self.model.id_to_token(token) or ""
        parts = [name] if name in self._byte_names else [*name]
        if not parts or any(part not in self._byte_names for part in parts):
            return None
        return bytes(self._byte_names[part] for part in parts)

    @cached_property
    def _byte_names(self) -> dict[str, int]:
        """Bytes by their names in the vocabulary; empty if bytes have none."""
        decoder = self.model.decoder
        for names in (_byte_level_names(), _FALLBACK_NAMES):
            if decoder and decoder.decode([names[byte] for byte in "é".encode()]) == "é":
                return {name: byte for byte, name in enumerate(names)}
        return {}

    def check_fits(self, model: HymbaConfig, name: str) -> None:
        """Raises HymbaError if the model cannot work with the tokenizer.

        Args:
          name: of the tokenizer, for messages.
        """
        problems = []
        if self.vocab_size > model.num_embeddings:
            problems.append(
                f"it has {self.vocab_size} tokens, model.vocab_size is {model.num_embeddings}"
            )
        for role, own in (("bos", self.bos_id), ("eos", self.eos_id)):
            wanted = getattr(model, f"{role}_token_id")
            if own is not None and own != wanted:
                problems.append(f"its {role} token is {own}, model.{role}_token_id is {wanted}")
        if problems:
            raise HymbaError(f"tokenizer {name} does not fit: " + "; ".join(problems))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, each atomically."""
        directory = resolve_location(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, object] = {"bos_token": None, **self.named_tokens}
        if self.chat_templates.keys() == {"default"}:
            config["chat_template"] = self.chat_template
        elif self.chat_templates:
            config["chat_template"] = [
                {"name": name, "template": template}
                for name, template in self.chat_templates.items()
            ]
        replace_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        with _one_line("the tokenizer failed"):
            content = self.model.to_str(pretty=True)
        replace_text(directory / "tokenizer.json", content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a tokenizer.json, or the one in a directory.

        The special tokens are those that a tokenizer_config.json or special_tokens_map.json beside
        it names, else those with a customary name; a "bos_token" of null is none. The chat
        template is in a chat_template.jinja beside it, else in the tokenizer_config.json.

        Raises:
          HymbaError: a file is missing or unusable.
          OSError: it cannot be read.
        """
        path = resolve_location(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.exists():
            raise HymbaError(f"{path}: no such tokenizer file: check the path")
        content = read_text(path)
        with _one_line(f"{path}: not a file of the tokenizers library", "give a tokenizer.json"):
            model = tokenizers.Tokenizer.from_str(content)
        config_file = path.with_name("tokenizer_config.json")
        config = read_json(config_file) if config_file.exists() else {}
        _override_flags(model, config_file, config.get("added_tokens_decoder"))
        roles = _named_tokens(path, config)
        with _one_line(f"{path}: its special tokens"):
            found = {role: _special_name(path, model, role, roles) for role in NAMED_TOKENS}
        named = {role: name for role, name in found.items() if name is not None}
        templates = _template_files(path.parent) or _named_templates(
            config_file, config.get("chat_template")
        )
        try:
            return cls(model, named.get("bos_token"), named["eos_token"], templates, named)
        except HymbaError as error:
            raise HymbaError(f"{path}: {error}") from error


def build_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of this name; a BPE is trained on `texts`, deterministically.

    A BPE has fewer tokens than requested if the text has too few repeated pairs.

    Args:
      name: `bytes`, `bpe:SIZE`, or the path of a tokenizer.json or of a directory that holds one.

    Raises:
      HymbaError: it is none of these, or its file is unusable.
    """
    if name == "bytes":
        return _byte_level_bpe()
    if size := DataConfig(tokenizer=name).bpe_size:
        return _byte_level_bpe(texts, size)
    if not resolve_location(name).exists():
        raise HymbaError(
            f"unknown tokenizer {name!r}: "
            "give bytes, bpe:SIZE, or the path of a tokenizer.json that exists"
        )
    return Tokenizer.load(name)


def _byte_level_bpe(texts: Iterable[str] = (), size: int = 0) -> Tokenizer:
    """Byte-level BPE with merges for a vocabulary of `size`; without texts, bytes alone."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return Tokenizer(model, BOS, EOS)


def _byte_level_names() -> list[str]:
    """The character of each byte in a byte-level vocabulary, as GPT-2 has it."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _named_tokens(path: Location, config: dict[str, Any]) -> dict[str, str | None]:
    """Names of the special tokens that the files beside a tokenizer.json give, by role.

    As in the transformers library: a special_tokens_map.json is the older format, and takes
    precedence if the tokenizer_config.json has that format too.
    """
    map_file = path.with_name("special_tokens_map.json")
    sources = [(path.with_name("tokenizer_config.json"), config)]
    if map_file.exists():
        sources.insert("added_tokens_decoder" not in config, (map_file, read_json(map_file)))
    roles: dict[str, str | None] = {}
    for file, values in sources:
        for role in NAMED_TOKENS & values.keys():
            value = values[role]
            name = value.get("content") if isinstance(value, dict) else value
            if not (isinstance(name, str) or value is None):
                raise HymbaError(f"{file}: {role} is neither a name nor null: fix or remove it")
            roles[role] = name
    return roles


def _special_name(
    path: Location, model: tokenizers.Tokenizer, role: str, roles: Mapping[str, str | None]
) -> str | None:
    """Name of the special token for `role`: the one that is named, else a customary one."""
    named = roles.get(role)
    if named is not None:
        names: tuple[str, ...] = (named,)
    elif role == "bos_token" and role in roles:
        names = ()
    else:
        names = _CUSTOMARY.get(role, ())
    for name in names:
        if model.token_to_id(name) is not None:
            return name
    if role == "eos_token" or (role == "bos_token" and named is not None):
        raise HymbaError(
            f"{path}: no {role} (looked for {', '.join(names)}): "
            "name a token that it has in a tokenizer_config.json beside it"
        )
    return None


def _override_flags(model: tokenizers.Tokenizer, path: Location, listed: object) -> None:
    """Gives added tokens the flags that a tokenizer_config.json has, where it has any."""
    if listed is None:
        return
    try:
        if not isinstance(listed, dict):
            raise TypeError("not an object")
        tokens = [AddedToken(**flags) for flags in listed.values()]
    except (TypeError, ValueError) as error:
        raise HymbaError(f"{path}: added_tokens_decoder: {_first_line(error)}") from error
    known = [token for token in tokens if model.token_to_id(token.content) is not None]
    with _one_line(f"{path}: added_tokens_decoder"):
        model.add_tokens(known)


def _template_files(directory: Location) -> dict[str, str]:
    """The chat templates that are files of their own, by name."""
    files = {
        file.stem: file for file in matches(directory / "additional_chat_templates", "*.jinja")
    }
    if (default := directory / "chat_template.jinja").exists():
        files["default"] = default
    return {name: read_text(file) for name, file in files.items()}


def _named_templates(path: Location, named: object) -> dict[str, str]:
    """The config's chat templates by name; a single one is the default."""
    if named is None:
        return {}
    if isinstance(named, str):
        return {"default": named}
    if isinstance(named, list) and all(_is_named_template(item) for item in named):
        return {item["name"]: item["template"] for item in named}
    raise HymbaError(
        f'{path}: chat_template is neither a string nor a list of {{"name", "template"}}: '
        "fix or remove it"
    )


def _is_named_template(item: object) -> bool:
    return isinstance(item, dict) and all(
        isinstance(item.get(key), str) for key in ("name", "template")
    )


def _tokenization(tokenizer: Tokenizer) -> dict[str, Any]:
    """The part of a tokenizer that determines the ids of ordinary text."""
    parts = json.loads(tokenizer.model.to_str())
    return {name: parts[name] for name in ("model", "normalizer", "pre_tokenizer")}


def _digest(parts: Sequence[object]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HymbaError(
            f"{shown(text)} is not valid Unicode: it has bytes that are not UTF-8"
        ) from error


@contextmanager
def _one_line(what: str, advice: str = "") -> Iterator[None]:
    """Turns whatever the tokenizers library raises, panics of its Rust code too, into one line."""
    try:
        yield
    except (HymbaError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # PanicException does not derive from Exception
        reason = f"{what} ({_first_line(error)})"
        raise HymbaError(f"{reason}: {advice}" if advice else reason) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
