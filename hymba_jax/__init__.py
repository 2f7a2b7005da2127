"""Hymba (arXiv 2411.13676) in JAX and Flax NNX.

Where each idea of the paper is:

| idea                                     | file                                            |
|------------------------------------------|-------------------------------------------------|
| attention and SSM heads in parallel      | `model/mixer.py`                                |
| meta tokens                              | `model/hymba.py`, `ops/attention/reference.py`  |
| sliding windows, sharing between layers  | `layer_pattern.py`, `model/attention.py`        |
| Mamba with inner norms                   | `model/ssm.py`, `ops/selective_scan/`           |
| the sizes of the family, the roadmap     | `config.py`                                     |
| the released checkpoint's names          | `convert/mapping.py`                            |
| training                                 | `training/loop.py`, from top to bottom          |
"""
