"""`hymba designs`: what the designs of the paper's comparison cost, side by side.

Parameters, caches and FLOPs of configs, next to the paper's numbers. Nothing is trained or
allocated.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hymba_jax.checkpoint.model_file import read_model
from hymba_jax.config import DType, HymbaConfig
from hymba_jax.config.data import DATA_BOUNDS
from hymba_jax.config.field_types import bound_problems
from hymba_jax.config.run import CONFIG_FILE
from hymba_jax.convert.inspect import count_by_part
from hymba_jax.errors import HymbaError, printable
from hymba_jax.files import Location, matches, resolve_location
from hymba_jax.inference.memory import cache_bytes, meta_state_bytes
from hymba_jax.model.abstract import param_shapes
from hymba_jax.model.flops import forward_flops, training_flops
from hymba_jax.model.hymba import layer_paths


@dataclass(frozen=True)
class PaperNumbers:
    """What the paper reports of a design (Tab. 1 and the text on sequential hybrids).

    Attributes:
      ratio: of attention to SSM parameters; empty if it reports none.
      cache_mb: 10**6 bytes at 8000 tokens.
    """

    ratio: str
    cache_mb: float


PAPER = {
    "01_mamba": PaperNumbers("0:1", 1.87),
    "02_attention_4": PaperNumbers("1:8.48", 99.09),
    "03_attention_8": PaperNumbers("1:4.24", 197.39),
    "04_attention_16": PaperNumbers("1:2.12", 394.00),
    "05_grouped_queries": PaperNumbers("1:3.64", 148.24),
    "06_llama": PaperNumbers("1:0", 414.72),
    "07_windows": PaperNumbers("1:3.64", 5.51),
    "08_windows_and_global": PaperNumbers("1:3.64", 41.19),
    "09_sharing": PaperNumbers("1:5.23", 39.42),
    "10_llama_compressed": PaperNumbers("1:0", 28.98),
    "11_concat": PaperNumbers("1:5.82", 39.42),
    "12_mamba_meta": PaperNumbers("0:1", 1.87),
    "13_hymba": PaperNumbers("1:5.23", 40.01),
    "sequential": PaperNumbers("", 156.3),
}
"""By the name of the config's file."""

DESIGNS = "configs/designs"

_PAPER_CACHE = 8000, "bfloat16"  # tokens, and dtype of keys, values and states


@dataclass(frozen=True)
class DesignsConfig:
    """Compares designs: parameters by component, the ratio of attention to SSM parameters, the
    cache, and FLOPs per token, beside the paper's numbers. Nothing is trained or allocated.

    Attributes:
      configs: TOML files of runs or models, or directories of them, local, gs:// or s3://; those
        of the paper, in the repository, if none is named.
      context: tokens of a sequence that is trained on, prefilled, or precedes a decoded token.
      dtype: of keys, values and states in the cache.
      format: tables, or a JSON object per design and line.

    Raises:
      HymbaError: the context is impossible.
    """

    configs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH")] = (
        DESIGNS,
    )
    context: int = 8000
    dtype: DType = "bfloat16"
    format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        if problems := [*bound_problems(self, {"context": DATA_BOUNDS["sequence_length"]})]:
            raise HymbaError("; ".join(problems))


@dataclass(frozen=True)
class Design:
    """The numbers of one design.

    Attributes:
      parameters: by component, as `hymba inspect` names them.
      attention_parameters, ssm_parameters: those that the paper's ratio is of.
      cache: bytes of one sequence, by purpose and dtype.
      paper_counts: bytes that the paper counts of them.
      training_flops, prefill_flops, decode_flops: per token.
      paper: what the paper reports.
    """

    name: str
    layers: str
    parameters: Mapping[str, int]
    attention_parameters: int
    ssm_parameters: int
    cache: Mapping[str, int]
    paper_counts: int
    training_flops: float
    prefill_flops: float
    decode_flops: float
    paper: PaperNumbers | None


def main(args: DesignsConfig) -> None:
    """Prints tables, or JSON lines.

    Raises:
      HymbaError: a file is not there, or not the config of a model.
    """
    found = [
        describe(_name(path), read_model(path)[0], args.context, args.dtype)
        for path in _files(args.configs)
    ]
    if args.format == "json":
        for design in found:
            print(json.dumps(dataclasses.asdict(design)))
        return
    console = Console()
    console.print(_parameter_table(found))
    console.print(_cache_table(found, args.context, args.dtype))
    console.print(_flops_table(found, args.context))


def describe(name: str, config: HymbaConfig, context: int, dtype: DType) -> Design:
    """The numbers of a design, by its config."""
    attention, ssm = head_parameters(config)
    after = forward_flops(config, context + 1, predicted=1)
    return Design(
        name=name,
        layers=config.layers,
        parameters=dict(count_by_part(config)),
        attention_parameters=attention,
        ssm_parameters=ssm,
        cache=dict(cache_bytes(config, context, dtype, dtype)),
        paper_counts=paper_count(config, context, dtype),
        training_flops=training_flops(config, context) / context,
        prefill_flops=forward_flops(config, context, predicted=1) / context,
        decode_flops=after - forward_flops(config, context, predicted=0),
        paper=PAPER.get(name),
    )


def head_parameters(config: HymbaConfig) -> tuple[int, int]:
    """Parameters of attention and of SSM heads, as the ratios of the paper's Tab. 1 imply.

    An output projection belongs to the heads that it reads; in hybrid layers to the SSM heads, and
    of concatenated heads only the rows that read these.
    """
    shapes = param_shapes(config, scan_layers=False)
    attention = ssm = 0
    for spec, layer in zip(config.layer_specs, layer_paths(config, scan_layers=False), strict=True):
        of_layer = {
            path[len(layer.path) :]: math.prod(shape)
            for path, shape in shapes.items()
            if path[: len(layer.path)] == layer.path
        }
        attention += sum(size for path, size in of_layer.items() if "attention" in path)
        ssm += sum(size for path, size in of_layer.items() if "ssm" in path)
        if spec.ssm:
            ssm += config.hidden_size * config.channels
        else:
            attention += config.hidden_size * config.attention_channels
    return attention, ssm


def paper_count(config: HymbaConfig, context: int, dtype: DType) -> int:
    """Bytes that the paper counts of a cache.

    Keys and values, in global layers those of the meta tokens too, and SSM states; inputs of the
    convolution only where there is no attention.
    """
    sizes = _by_purpose(cache_bytes(config, context, dtype, dtype))
    meta = _by_purpose(meta_state_bytes(config, dtype))
    has_attention = any(spec.attention for spec in config.layer_specs)
    convolution = sum(size for purpose, size in sizes.items() if "conv" in purpose)
    all_heads = sum(sizes.values()) + meta.get("global KV", 0)
    return all_heads - convolution if has_attention else all_heads


def _by_purpose(sizes: Mapping[str, int]) -> dict[str, int]:
    return {purpose.rsplit(", ", 1)[0]: size for purpose, size in sizes.items()}


def _files(paths: Sequence[str]) -> Iterator[Location]:
    for path in map(resolve_location, paths):
        if not path.exists():
            advice = "name runs or TOML files"
            if str(path) == DESIGNS:
                advice = f"run it in the repository of hymba_jax, or {advice}"
            raise HymbaError(f"{path}: no such file or directory: {advice}")
        files = matches(path, "*.toml") if path.is_dir() else [path]
        if not files:
            raise HymbaError(f"{path}: the directory has no .toml files")
        yield from files


def _name(file: Location) -> str:
    """Of a run or a model that of its directory, as its file always has one name."""
    return file.absolute().parent.name if file.name == CONFIG_FILE else file.stem


def ratio(attention: int, ssm: int) -> str:
    """As the paper writes it: 1:3.64, or 0:1 and 1:0 where one kind of head is missing."""
    return f"1:{ssm / attention:.2f}" if attention and ssm else f"{attention and 1}:{ssm and 1}"


# Of the components that `count_by_part` tells apart; the others are small.
_COLUMNS = {
    "embedding": "embed-\nding",
    "output projection": "output\nhead",
    "attention": "attention",
    "SSM": "SSM",
    "fusion of both": "fusion",
    "MLP": "MLP",
}


def _parameter_table(designs: Sequence[Design]) -> Table:
    parts = [part for part in _COLUMNS if any(part in design.parameters for design in designs)]
    table = _table(
        "parameters, in millions",
        (*(_COLUMNS[part] for part in parts), "other", "in all"),
        "fusion: norms and output projections of the heads; other: meta tokens, norms of the "
        "residual stream",
    )
    for design in designs:
        counts = [design.parameters.get(part, 0) for part in parts]
        total = sum(design.parameters.values())
        cells = (f"{count / 1e6:,.1f}" if count else "" for count in (*counts, total - sum(counts)))
        table.add_row(Text(printable(design.name)), *cells, f"{total / 1e6:,.1f}")
    return table


def _cache_table(designs: Sequence[Design], context: int, dtype: DType) -> Table:
    table = _table(
        f"heads, and the cache of {context:,} tokens",
        ("attention\n: SSM", "paper's", "cache\nMB", "as the paper\ncounts", "paper's"),
        "the paper's ratio is of parameters; its cache, of 8,000 tokens in bfloat16, is without "
        "inputs of the convolution beside attention, and with the meta tokens' keys and values of "
        "global layers",
    )
    for design in designs:
        paper = design.paper
        table.add_row(
            Text(printable(design.name)),
            ratio(design.attention_parameters, design.ssm_parameters),
            paper.ratio if paper else "",
            f"{sum(design.cache.values()) / 1e6:,.2f}",
            f"{design.paper_counts / 1e6:,.2f}",
            f"{paper.cache_mb:,.2f}" if paper and (context, dtype) == _PAPER_CACHE else "",
        )
    return table


def _flops_table(designs: Sequence[Design], context: int) -> Table:
    table = _table(f"MFLOPs a token, of {context:,} tokens", ("training", "prefill", "decode"))
    for design in designs:
        flops = (design.training_flops, design.prefill_flops, design.decode_flops)
        table.add_row(Text(printable(design.name)), *(f"{value / 1e6:,.0f}" for value in flops))
    return table


def _table(title: str, columns: Sequence[str], caption: str = "") -> Table:
    """A table for 80 columns: a name that is too long is folded, and never a number."""
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1)
    )
    table.add_column("design", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
