"""Every option as a field of a frozen object that checks itself: no JAX arrays, no I/O but TOML.

| file               | subject                                                            |
|--------------------|--------------------------------------------------------------------|
| `model.py`         | the architecture, its presets, and how it is computed              |
| `layer_pattern.py` | which heads each layer has, written as the paper draws them        |
| `data.py`          | what to read and how to tokenize it                                |
| `training.py`      | how long, how fast and how often                                   |
| `adapter.py`       | small trained updates of frozen kernels                            |
| `dpo.py`           | preference optimization                                            |
| `distill.py`       | distillation from a teacher                                        |
| `tracking.py`      | where the metrics go beside the run directory                      |
| `parallel.py`      | the axes of the device mesh                                        |
| `distributed.py`   | how processes find one another                                     |
| `sampling.py`      | what is sampled from a model                                       |
| `escapes.py`       | escapes in the command line's strings                              |
| `stages.py`        | parts of a run, each with its own data, shapes and schedule        |
| `run.py`           | all of a training run, from a TOML file                            |
| `toml.py`          | configs as TOML                                                    |
| `field_types.py`   | what is wrong with a value, in words                               |
"""

from hymba_jax.config.model import (
    PRESETS,
    AttentionConfig,
    Auto,
    CacheFormat,
    ComputeConfig,
    ConfigError,
    DType,
    HymbaConfig,
    Remat,
    RopeType,
    SSMConfig,
    WeightFormat,
)

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "Auto",
    "CacheFormat",
    "ComputeConfig",
    "ConfigError",
    "DType",
    "HymbaConfig",
    "Remat",
    "RopeType",
    "SSMConfig",
    "WeightFormat",
]
