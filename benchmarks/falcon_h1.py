"""The 125M on the CPU beside Falcon-H1 of transformers, the hybrid nearest to Hymba, at one size.

    python benchmarks/falcon_h1.py --transformers PYTHON [--dtype float32 bfloat16]

Falcon-H1 has the 125M's width, depth, heads, MLP and vocabulary, and Mamba2 heads with states of
128 beside its attention; random weights on both sides. Prefill of one prompt, milliseconds of a
decoded token behind such prompts, and loss and gradient of one sequence, of ours also with stacked
layers (`compute.scan_layers`), and `compute.remat` "activations", as every array that is kept is
copied there; each dtype and side in a process of its own, one after the other.
"""

import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tyro
from _report import Row, median_ms, report, run_in_subprocess, write_json
from inference import decode_ms, random_model
from train_step import Args as StepArgs
from train_step import shape_row

from hymba_jax.config import PRESETS, DType
from hymba_jax.host import prepare_host
from hymba_jax.inference.engine import Engine

CONFIG = PRESETS["hymba-125m"]
BATCHES = (1, 8)


@dataclass(frozen=True)
class Args:
    """What to measure.

    Attributes:
      transformers: a Python with torch and transformers.
      dtype: of parameters and activations; of our gradients activations alone.
      context: tokens of the prompt, and of the cache of decoding.
      length: tokens of the sequence of loss and gradient.
      row: measure the first dtype in this process and write it to `json`; what each child does.
      json: file for the rows as JSON lines.
    """

    transformers: str = ""
    dtype: tuple[DType, ...] = ("float32", "bfloat16")
    context: int = 1024
    length: int = 512
    repeats: int = 5
    row: bool = False
    json: Path | None = None


def main(args: Args) -> None:
    if args.row:
        assert args.json is not None
        write_json([native(args)], args.json)
        return
    rows: list[Row] = []
    for dtype in args.dtype:
        shared = ["--context", str(args.context), "--length", str(args.length), "--row"]
        shared += ["--repeats", str(args.repeats)]
        of_native = run_in_subprocess(__file__, ["--dtype", dtype, *shared])
        rows += [{"model": "Hymba", "dtype": dtype, **of_native}]
        rows += [{"model": "Falcon-H1", "dtype": dtype, **falcon(args, dtype)}]
    title = f"ms: prefill 1 x {args.context}, decoded token, loss and gradient 1 x {args.length}"
    report(title, rows, args.json)


def native(args: Args) -> Row:
    prepare_host()
    (dtype,) = args.dtype
    engine = Engine(random_model(CONFIG, dtype))
    prompt = np.random.default_rng(0).integers(3, CONFIG.num_embeddings, args.context).tolist()
    prefill = median_ms(
        lambda: jax.block_until_ready(engine.prefill([prompt], args.context)), repeats=args.repeats
    )
    row: Row = {"parameters": engine.num_params, "prefill": prefill}
    for batch in BATCHES:
        row[f"decode {batch}"] = decode_ms(engine, batch, args.context, args.repeats)
    del engine
    step = StepArgs(shape="125m", length=(args.length,), dtype=dtype, steps=args.repeats)
    apart = replace(step, scan_layers=False)
    stacked = replace(step, scan_layers=True, remat="activations")
    for name, way in (("gradient", apart), ("gradient, stacked", stacked)):
        row[name] = shape_row(way, CONFIG)["ms"]
    return row


def falcon(args: Args, dtype: DType) -> Row:
    heads = CONFIG.attention
    config = {
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.mlp_size,
        "num_hidden_layers": len(CONFIG.layer_specs),
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "vocab_size": CONFIG.num_embeddings,
        "tie_word_embeddings": True,
        "mamba_d_ssm": CONFIG.channels,
        "mamba_n_heads": CONFIG.channels // 64,
        "mamba_d_state": 128,
    }
    options = {
        "config": config,
        "dtype": dtype,
        "context": args.context,
        "length": args.length,
        "repeats": args.repeats,
        "batches": BATCHES,
    }
    script = Path(__file__).with_name("_transformers_falcon_h1.py")
    command = [args.transformers, str(script), json.dumps(options)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row: Row = json.loads(printed.splitlines()[-1])
    return row


if __name__ == "__main__":
    main(tyro.cli(Args))
