"""A native tokenizer as files that transformers reads."""

import json
from pathlib import Path

import tokenizers
from tokenizers.processors import TemplateProcessing

from hymba_jax.config import HymbaConfig
from hymba_jax.files import read_json
from hymba_jax.tokenizer import Tokenizer


def write_hf_tokenizer(tokenizer: Tokenizer, config: HymbaConfig, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    `AutoTokenizer` then gives a prompt the ids that it has here, where the model is given the
    beginning-of-sequence token by id. Only names of special tokens in a prompt differ: they are
    ordinary text here, and tokens there.
    """
    tokenizer.save(directory)
    file, config_file = directory / "tokenizer.json", directory / "tokenizer_config.json"
    model = tokenizers.Tokenizer.from_file(str(file))
    ids = [*tokenizer.bos_ids, *model.encode("a", add_special_tokens=False).ids]
    if model.encode("a").ids != ids:
        begin = "" if tokenizer.bos is None else f"{tokenizer.bos} "
        model.post_processor = TemplateProcessing(
            single=f"{begin}$A",
            pair=f"{begin}$A {begin}$B",
            special_tokens=[(tokenizer.bos, token) for token in tokenizer.bos_ids],
        )
        file.write_text(model.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # or it would change the text that is decoded
        "model_max_length": config.max_positions,
        **read_json(config_file),
    }
    pad = model.id_to_token(config.pad_token_id)
    if pad in tokenizer.special_tokens:
        settings["pad_token"] = pad
    config_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
