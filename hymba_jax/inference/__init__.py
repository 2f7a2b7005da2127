"""From a trained model to text.

| file                   | subject                                                           |
|------------------------|-------------------------------------------------------------------|
| `language_model.py`    | text in, text out                                                 |
| `prompts.py`           | prompts to tokens                                                 |
| `engine.py`            | the compiled programs: prefill, insert, decode, verify            |
| `programs.py`          | these programs, functions of parameters and of a batch's state    |
| `batch_state.py`       | what they pass to each other                                      |
| `prompt_lookup.py`     | drafts of the next tokens, from earlier ones of the sequence      |
| `prefix_cache.py`      | states after the beginnings of prompts, kept between requests     |
| `sampling.py`          | sampling the next token                                           |
| `completion_stream.py` | sampled tokens to the deltas of a completion                      |
| `text_stream.py`       | tokens to text as they come; stop strings                         |
| `tool_calls.py`        | the tools that an answer calls                                    |
| `loading.py`           | a model with its tokenizer from a directory                       |
| `fingerprint.py`       | a digest of all that decides a model's answers                    |
| `generation_config.py` | the `generation_config.json` of an HF checkpoint                  |
| `generate.py`          | `hymba generate`                                                  |
| `chat.py`              | `hymba chat`                                                      |
| `hidden_fields.py`     | fields of a config that a command does not offer                  |
| `memory.py`            | the memory footprint of sequences                                 |
| `warmup.py`            | `hymba warmup`, and where compiled programs are kept              |

What is kept between tokens is the model's own: `hymba_jax/model/state.py`.
"""

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.inference.completion_stream import Delta
from hymba_jax.inference.language_model import Completion, LanguageModel
from hymba_jax.inference.loading import load

__all__ = ["Completion", "Delta", "LanguageModel", "SamplingConfig", "load"]
