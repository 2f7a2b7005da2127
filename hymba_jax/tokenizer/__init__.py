"""Text and conversations to token ids, and back.

| file                  | subject                                                                |
|-----------------------|------------------------------------------------------------------------|
| `tokenizer.py`        | bytes, a BPE trained here, or any `tokenizer.json`                     |
| `control_tokens.py`   | special and added tokens, which user text can never become             |
| `chat_template.py`    | conversations as text and as tokens                                    |
| `answers.py`          | which tokens of a conversation the loss is on                          |
| `template_sandbox.py` | what a chat template can do: no access, limited time and size          |
| `traced_text.py`      | strings that know which characters the template wrote, and which users |
"""

from hymba_jax.tokenizer.tokenizer import REPLACEMENT, Tokenizer, build_tokenizer

__all__ = ["REPLACEMENT", "Tokenizer", "build_tokenizer"]
