"""Between Hugging Face (HF) checkpoints in PyTorch's form and native ones.

| file                   | subject                                                          |
|------------------------|------------------------------------------------------------------|
| `mapping.py`           | the one table of names, layouts and splits, for both directions  |
| `hf_config.py`         | the HF `config.json`, with `hf_rope.py`                          |
| `hf_keys.py`           | every key that it may have                                       |
| `hf_tokenizer.py`      | a native tokenizer as transformers reads it                      |
| `hf_checkpoint.py`     | an HF checkpoint, to read from                                   |
| `tensor_file.py`       | safetensors files, read and written a part at a time             |
| `torch_file.py`        | `pytorch_model.bin`, where torch is installed                    |
| `native_checkpoint.py` | a standalone model or a checkpoint of a run, to read from        |
| `params_stream.py`     | parameters in Orbax's form, a few arrays at a time               |
| `arrays.py`            | memory layout and bits of NumPy arrays                           |
| `hf_to_native.py`      | one direction                                                    |
| `native_to_hf.py`      | the other                                                        |
| `convert.py`           | `hymba convert`, with `report.py` and `verify.py`                |
| `manifest.py`          | what a conversion wrote, and so may replace                      |
| `inspect.py`           | `hymba inspect`                                                  |
| `init_from.py`         | the model that a run starts from                                 |
| `peft.py`              | adapters in PEFT's files                                         |
| `export.py`            | `hymba export`                                                   |
| `load_sharded.py`      | an HF checkpoint straight onto a device mesh                     |
"""

from hymba_jax.convert.load_sharded import load_hf

__all__ = ["load_hf"]
