"""Between released PyTorch checkpoints and directories of ours.

| file                     | subject                                                        |
|--------------------------|----------------------------------------------------------------|
| `mapping.py`             | the one table of names, layouts and splits, for both directions |
| `released_config.py`     | the HF `config.json`, with `released_rope.py`                  |
| `hf_keys.py`             | every key that it may have                                     |
| `hf_tokenizer.py`        | a native tokenizer as transformers reads it                    |
| `released_checkpoint.py` | a released directory, to read from                             |
| `tensor_file.py`         | safetensors files, read and written a part at a time           |
| `torch_file.py`          | `pytorch_model.bin`, where torch is installed                  |
| `our_checkpoint.py`      | a model alone or a run of ours, to read from                   |
| `params_stream.py`       | parameters in Orbax's form, a few arrays at a time             |
| `zarr_file.py`           | one array of these, as a file                                  |
| `writing.py`             | processors and disk busy at the same time                      |
| `released_to_ours.py`    | one direction                                                  |
| `ours_to_released.py`    | the other                                                      |
| `convert.py`             | `hymba convert`, with `report.py` and `verify.py`              |
| `manifest.py`            | what a conversion wrote, and so may replace                    |
| `inspect.py`             | `hymba inspect`                                                |
| `placing.py`             | a released checkpoint straight onto a device mesh              |
"""

from hymba_jax.convert.placing import load_released

__all__ = ["load_released"]
