"""Drafts from earlier tokens of the sequence (`--speculate`), against one token after another.

python benchmarks/speculation.py --model runs/tiny [--json FILE]

One sequence on this machine, streamed token by token and generated at once. "repeated" begins with
a method written six times, "code" with the beginning of a module; "sampled" goes on with the same
at temperature 0.8, "random" at 1.3 from next to nothing. Times are the shortest of five runs, which
take turns; "verified" are the tokens of an average verification.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from _report import Row, report

from hymba_jax import load
from hymba_jax.host import prepare_host
from hymba_jax.inference import engine
from hymba_jax.inference.batch_state import DecodeState, SampledTokens
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.inference.programs import DECODE_STEPS

METHOD = "    def a(self):\n        return self.a\n\n"
CODE = Path(engine.__file__).read_text()[:600]
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "repeated": (METHOD * 6 + METHOD[:10], {}),
    "code": (CODE, {}),
    "sampled": (CODE, {"temperature": 0.8, "seed": 1}),
    "random": ("import os\n", {"temperature": 1.3, "seed": 3}),
}
REPEATS = 5


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      model: directory of a model.
      tokens: that are generated.
    """

    model: str
    tokens: int = 256
    context: int = 512
    json: Path | None = None


def main(options: Options) -> None:
    prepare_host()
    model = load(options.model, context=options.context)
    verified: list[int] = []
    verify = model.engine.verify

    def counted(state: DecodeState, draft: Sequence[int]) -> tuple[DecodeState, SampledTokens]:
        state, sampled = verify(state, draft)
        verified.append(int((sampled.tokens >= 0).sum()))
        return state, sampled

    rows: list[Row] = []
    for name, (text, sampling) in TEXTS.items():
        for interval in (1, DECODE_STEPS):
            asked = {**sampling, "max_new_tokens": options.tokens, "stream_interval": interval}
            seconds: dict[bool, list[float]] = {False: [], True: []}
            tokens: dict[bool, list[int]] = {}
            for _ in range(REPEATS):
                for model.speculate in (False, True):
                    start = time.perf_counter()
                    tokens[model.speculate] = generate(model, text, asked)
                    seconds[model.speculate].append(time.perf_counter() - start)
            assert tokens[False] == tokens[True], name
            model.engine.verify = counted  # type: ignore[method-assign]
            verified.clear()
            generate(model, text, asked)
            model.engine.verify = verify  # type: ignore[method-assign]
            rate = {which: len(tokens[which]) / min(seconds[which]) for which in seconds}
            rows.append(
                {
                    "text": name,
                    "tokens at a time": interval,
                    "tokens/s": rate[False],
                    "speculating": rate[True],
                    "times as fast": rate[True] / rate[False],
                    "verifications": len(verified),
                    "verified": sum(verified) / max(len(verified), 1),
                }
            )
    report("speculation", rows, options.json)


def generate(model: LanguageModel, text: str, asked: dict[str, Any]) -> list[int]:
    """The tokens of one completion."""
    return [token for delta in model.stream(text, **asked) for token in delta.tokens]


if __name__ == "__main__":
    main(tyro.cli(Options))
