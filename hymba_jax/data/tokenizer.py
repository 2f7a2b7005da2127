"""Text to token ids and back: bytes, a byte-level BPE trained here, or any `tokenizer.json`.

All three are a `tokenizers.Tokenizer`, so they save, load and encode alike. Special tokens come
from ids alone: text that looks like one ("<s>") is encoded as ordinary text.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from hymba_jax.data.config import DataConfig
from hymba_jax.errors import HymbaError
from hymba_jax.files import read_json, read_text, replace_text, resolve_path

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

_BOS_NAMES = (BOS, "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = (EOS, "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")

# GPT-4's split of text into words, with two changes for source code: a line break takes the
# indentation after it along, and so does punctuation at the end of a line, so that "):\n        "
# can be one token. Letters never share a word with what follows them: text cannot merge into the
# name of a special token.
_WORD = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?"
    r"|\s*[\r\n]+[ \t]*"
    r"|\s+(?!\S)"
    r"|\s+"
)


class Tokenizer:
    """A vocabulary with a begin-of-text and an end-of-text token.

    Attributes:
      model: the underlying `tokenizers.Tokenizer`.
      vocab_size: the largest token id plus one.
      bos_id, eos_id: ids of the tokens before and after each document.
      special_tokens: the id of each special token, by name.
      chat_template: how a conversation is written for the model, in Jinja; None if it is not said.
    """

    def __init__(
        self, model: tokenizers.Tokenizer, bos: str, eos: str, chat_template: str | None = None
    ) -> None:
        # A released file may ask for truncation or padding, or not mark its tokens as special.
        model.no_truncation()
        model.no_padding()
        model.add_special_tokens([AddedToken(name, special=True) for name in (bos, eos)])
        model.encode_special_tokens = True  # that is: as ordinary text
        self.model = model
        self.bos, self.eos = bos, eos
        vocabulary = model.get_vocab()
        self.bos_id, self.eos_id = vocabulary[bos], vocabulary[eos]
        self.vocab_size = max(vocabulary.values()) + 1
        added = model.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: number for number, token in added if token.special}
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens. Raises HymbaError where it is no text."""
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise HymbaError(f"{text!a} is no text: it has bytes that are not UTF-8")
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, on all processor cores."""
        encodings = self.model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out."""
        return self.model.decode(list(ids), skip_special_tokens=True)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, each of them whole or not at all."""
        directory = resolve_path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"bos_token": self.bos, "eos_token": self.eos}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        replace_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        replace_text(directory / "tokenizer.json", self.model.to_str(pretty=True))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a tokenizer.json, or the one in a directory.

        The special tokens are those that a tokenizer_config.json beside it names, else those with
        a customary name. The chat template is in a chat_template.jinja beside it, else in the
        tokenizer_config.json. Raises HymbaError where a file is missing or unusable.
        """
        path = resolve_path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise HymbaError(f"{path}: no such tokenizer file: check the path")
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise HymbaError(
                f"{path}: not a file of the tokenizers library ({_first_line(error)}): "
                "give a tokenizer.json"
            ) from error
        config_file = path.with_name("tokenizer_config.json")
        config = _read_config(config_file)
        bos = _special_name(path, model, config.get("bos_token"), "begin-of-text", _BOS_NAMES)
        eos = _special_name(path, model, config.get("eos_token"), "end-of-text", _EOS_NAMES)
        template_file = path.with_name("chat_template.jinja")
        if template_file.is_file():
            template: str | None = read_text(template_file)
        else:
            template = _named_template(config_file, config.get("chat_template"))
        return cls(model, bos, eos, template)


def build_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` asks for; a BPE is trained on `texts`, always to the same result.

    A BPE gets fewer tokens than asked for where the text holds no more repeated pairs. Raises
    HymbaError where the tokenizer is none of the kinds known, or its file is unusable.
    """
    if config.tokenizer == "bytes":
        return _byte_level_bpe()
    if config.bpe_size is not None:
        return _byte_level_bpe(texts, config.bpe_size)
    if not resolve_path(config.tokenizer).exists():
        raise HymbaError(
            f"unknown tokenizer {config.tokenizer!r}: "
            "give bytes, bpe:SIZE, or the path of a tokenizer.json that exists"
        )
    return Tokenizer.load(config.tokenizer)


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


def _read_config(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    return read_json(path)


def _named_template(path: Path, named: object) -> str | None:
    """The config's chat template; of several, each with a name, the one named default."""
    if isinstance(named, list) and all(_is_named_template(item) for item in named):
        named = {item["name"]: item["template"] for item in named}.get("default")
    if named is None or isinstance(named, str):
        return named
    raise HymbaError(
        f'{path}: chat_template is neither a text nor a list of {{"name", "template"}}: '
        "mend or remove it"
    )


def _is_named_template(item: object) -> bool:
    return isinstance(item, dict) and all(
        isinstance(item.get(key), str) for key in ("name", "template")
    )


def _special_name(
    path: Path, model: tokenizers.Tokenizer, named: object, role: str, customary: tuple[str, ...]
) -> str:
    """Name of the special token for `role`: the one the config names, else a customary one."""
    if isinstance(named, dict):
        named = named.get("content")
    names = (named,) if isinstance(named, str) else customary
    for name in names:
        if model.token_to_id(name) is not None:
            return name
    raise HymbaError(
        f"{path}: no {role} token (looked for {', '.join(names)}): "
        "name bos_token and eos_token in a tokenizer_config.json beside it"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
