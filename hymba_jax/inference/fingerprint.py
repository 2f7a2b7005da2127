"""What decides a model's answers, in one digest."""

import hashlib

from hymba_jax.checkpoint.checksums import digest, tree_checksums
from hymba_jax.inference.language_model import LanguageModel


def model_fingerprint(model: LanguageModel) -> str:
    """A digest of all that decides a model's answers: parameters, config, formats, tokenizer."""
    engine = model.engine
    parts = (
        engine.config,
        engine.dtype,
        engine.state_dtype,
        engine.kv_cache,
        engine.max_context,
        model.tokenizer.fingerprint,
        model.defaults,
        digest(tree_checksums(engine.params)),
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
