"""Text in, batches of tokens out.

| file                   | subject                                                               |
|------------------------|-----------------------------------------------------------------------|
| `local_tokens.py`      | tokens in a bucket, copied to the disk                                |
| `places.py`            | where the sources of a run are: text, tokens, or generated            |
| `tokenize_sources.py`  | those that are text, tokenized once into the run directory            |
| `sources.py`           | all of them, opened                                                   |
| `corpus.py`            | text with its split, such as the standard library's sources           |
| `listing.py`           | the files of a corpus: local or behind a URL                          |
| `formats.py`           | from the bytes of a file to documents                                 |
| `compression.py`       | gzip, zstd, xz and bzip2, told by content                             |
| `records.py`           | a document, and a record that is none                                 |
| `text_field.py`        | records whose document is the text in one field                       |
| `conversations.py`     | records that are conversations                                        |
| `preferences.py`       | records that are pairs of a chosen and a rejected conversation        |
| `json_records.py`      | documents of JSON lines and JSON arrays                               |
| `parquet_records.py`   | documents of Parquet                                                  |
| `content.py`           | what of a record is the document, by its format                       |
| `documents.py`         | documents as a stream, and what is done about bad records             |
| `split.py`             | which documents are held out for validation                           |
| `encoder.py`           | tokenizing on all cores                                               |
| `tokenize_command.py`  | `hymba tokenize`                                                      |
| `tokenize_corpus.py`   | documents to shards, resumable                                        |
| `tokenize_records.py`  | what is done of a corpus that is being tokenized                      |
| `tokenize_progress.py` | how far tokenizing is                                                 |
| `show_examples.py`     | tokenized documents as a person reads them                            |
| `manifest.py`          | what a tokenized corpus says of itself                                |
| `block_checksums.py`   | checksums of shards, checked where they are read                      |
| `tokenized.py`         | a tokenized corpus, opened                                            |
| `megatron.py`          | Megatron's format of token files                                      |
| `loss_mask.py`         | which tokens of conversations the loss is on                          |
| `token_files.py`       | files of tokens that others wrote                                     |
| `token_store.py`       | shards of any format as one stream of tokens                          |
| `windows.py`           | windows of a stream as rows                                           |
| `document_rows.py`     | whole documents packed into rows                                      |
| `conversation_rows.py` | whole conversations packed into rows                                  |
| `preference_rows.py`   | pairs of conversations packed into rows                               |
| `permutation.py`       | the order of a source's rows in each epoch                            |
| `mixture.py`           | which source an example is from                                       |
| `examples.py`          | training examples, by index                                           |
| `batch.py`             | rows of tokens, as training steps take them                           |
| `pipeline.py`          | training and validation batches through Grain                         |
| `recall.py`            | tasks of recall, generated on the fly                                 |
| `recall_rows.py`       | one of these as a source                                              |
"""

from hymba_jax.config.data import DataConfig
from hymba_jax.data.batch import IGNORED_TARGET, Batch
from hymba_jax.data.local_tokens import with_local_tokens
from hymba_jax.data.pipeline import (
    Data,
    ValidationSet,
    open_data,
    train_batches,
    validation_batches,
)
from hymba_jax.data.places import Formats, source_formats, text_manifests
from hymba_jax.data.tokenize_sources import tokenize_sources

__all__ = [
    "IGNORED_TARGET",
    "Batch",
    "Data",
    "DataConfig",
    "Formats",
    "ValidationSet",
    "open_data",
    "source_formats",
    "text_manifests",
    "tokenize_sources",
    "train_batches",
    "validation_batches",
    "with_local_tokens",
]
