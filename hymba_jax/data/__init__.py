"""Text in, batches of token windows out.

| file                | subject                                                                 |
|---------------------|-------------------------------------------------------------------------|
| `sources.py`        | documents from text files, JSON lines or the standard library's sources |
| `tokenizer.py`      | bytes, a BPE trained here, or any `tokenizer.json`                      |
| `control_tokens.py` | special and added tokens, which user text can never become              |
| `packing.py`        | documents to one stream of tokens, the stream to windows                |
| `batch.py`          | rows of tokens, as training steps take them                             |
| `pipeline.py`       | training and validation batches through Grain                           |
"""

from hymba_jax.config.data import DataConfig
from hymba_jax.data.batch import IGNORED_TARGET, Batch
from hymba_jax.data.pipeline import Data, prepare, train_iterator, validation_batches
from hymba_jax.data.tokenizer import Tokenizer

__all__ = [
    "IGNORED_TARGET",
    "Batch",
    "Data",
    "DataConfig",
    "Tokenizer",
    "prepare",
    "train_iterator",
    "validation_batches",
]
