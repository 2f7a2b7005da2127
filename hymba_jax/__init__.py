"""Hymba (arXiv 2411.13676) in JAX and Flax NNX.

Where each idea of the paper is:

| idea                                     | file                                            |
|------------------------------------------|-------------------------------------------------|
| attention and SSM heads in parallel      | `model/mixer.py`                                |
| meta tokens                              | `model/hymba.py`, `model/block.py`              |
| sliding windows, sharing between layers  | `config/layer_pattern.py`, `model/attention.py` |
| Mamba with inner norms                   | `model/ssm.py`, `ops/selective_scan/`           |
| the sizes of the family, its ablations   | `config/model.py`                               |
| names and layouts of HF checkpoints      | `convert/mapping.py`                            |
| training                                 | `training/loop.py`, from top to bottom          |
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hymba_jax.inference import load

    __version__: str

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load`, imported lazily, as it imports JAX and Orbax; and `__version__`."""
    if name == "load":
        from hymba_jax.inference import load

        return load
    if name == "__version__":
        from importlib.metadata import version

        return version("hymba_jax")
    raise AttributeError(f"module 'hymba_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
