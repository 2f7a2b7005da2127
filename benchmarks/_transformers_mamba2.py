"""Times a Mamba2 layer of transformers on the CPU, for `benchmarks/ssd.py --transformers PYTHON`.

Runs in that Python, which need not have hymba_jax; prints one JSON object.
"""

import json
import sys

import torch
from _transformers_timing import median_ms
from transformers import Mamba2Config  # type: ignore[import-not-found]
from transformers.models.mamba2.modeling_mamba2 import (  # type: ignore[import-not-found]
    Mamba2Mixer,
)


def main(sizes: dict[str, int]) -> None:
    hidden = sizes["heads"] * sizes["head_dim"] // 2
    config = Mamba2Config(
        hidden_size=hidden,
        num_heads=sizes["heads"],
        head_dim=sizes["head_dim"],
        state_size=sizes["state"],
        n_groups=sizes["groups"],
        num_hidden_layers=1,
    )
    mixer = Mamba2Mixer(config, layer_idx=0)
    x = torch.randn(sizes["batch"], sizes["length"], hidden, requires_grad=True)

    def forward() -> None:
        with torch.no_grad():
            mixer(x)

    def backward() -> None:
        mixer.zero_grad()
        x.grad = None
        (mixer(x) ** 2).sum().backward()

    row = {
        "layer": "transformers",
        "forward ms": median_ms(forward, sizes["repeats"]),
        "+ backward ms": median_ms(backward, sizes["repeats"]),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
