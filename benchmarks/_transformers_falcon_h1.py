"""Times Falcon-H1 of transformers on the CPU, for `benchmarks/falcon_h1.py`.

Runs in a Python with torch and transformers, which need not have hymba_jax; prints one JSON object.
"""

import json
import sys
from functools import partial
from typing import Any

import torch
from _transformers_timing import median_ms
from transformers import (  # type: ignore[import-not-found]
    FalconH1Config,
    FalconH1ForCausalLM,
)


def main(options: dict[str, Any]) -> None:
    config = FalconH1Config(**options["config"])
    model = FalconH1ForCausalLM(config).to(getattr(torch, options["dtype"]))
    row: dict[str, Any] = {"parameters": sum(each.numel() for each in model.parameters())}
    repeats, context = options["repeats"], options["context"]

    def tokens(batch: int, length: int) -> torch.Tensor:
        return torch.randint(3, config.vocab_size, (batch, length))

    with torch.no_grad():
        prompt = tokens(1, context)
        row["prefill"] = median_ms(lambda: model(prompt, use_cache=True, logits_to_keep=1), repeats)
        for batch in options["batches"]:
            begun = model(tokens(batch, context - 64), use_cache=True, logits_to_keep=1)
            step = partial(model, past_key_values=begun.past_key_values, use_cache=True)
            row[f"decode {batch}"] = median_ms(partial(step, tokens(batch, 1)), 16)
    text = tokens(1, options["length"])

    def gradient() -> None:
        model.zero_grad()
        model(text, labels=text).loss.backward()

    row["gradient"] = median_ms(gradient, repeats)
    print(json.dumps(row))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
