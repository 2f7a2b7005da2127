"""Adapters: small trained updates of frozen kernels."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from hymba_jax.config.field_types import Bounds, bound_problems, shown, type_problems
from hymba_jax.errors import HymbaError

AdapterKind = Literal["none", "lora", "rslora", "dora"]

_BOUNDS = {
    "rank": Bounds(1, 2**17, "no kernel is wider", "an update of rank 0 is none"),
    "alpha": Bounds(1e-30, 1e30, "float32 cannot multiply by it", "the update would be zero"),
    "dropout": Bounds(0, 0.99, "hardly any input would be left"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter: the kernels W of some projections, which are frozen, become W + scale A B.

    A name pattern is one part of a name or several, such as `query_proj`, `ssm.gate_proj` or `mlp`;
    `*` stands for anything. It applies to all layers.

    Attributes:
      kind: "lora" (arXiv 2106.09685), scale = alpha / rank; "rslora" (arXiv 2312.03732), scale =
        alpha / sqrt(rank); "dora" (arXiv 2402.09353), LoRA that trains the norm of each output's
        weights by itself; "none" trains the model's own parameters.
      rank: columns of A and rows of B.
      alpha: see `kind`.
      dropout: fraction of an adapter's inputs that are zero in training. Meta tokens, whose state
        all sequences share, have none.
      targets: name patterns of the projections inside layers that have an adapter: query_proj,
        key_proj, value_proj, ssm.in_proj, ssm.gate_proj, x_proj, dt_proj, Mamba2's B_C_proj,
        out_proj, mlp.gate_proj, up_proj, down_proj; all of them by default.
      train: name patterns of the model's own parameters that are trained, too, such as
        meta_tokens, *norm, A_log, D or conv_*.

    Raises:
      HymbaError: naming every invalid value.
    """

    kind: AdapterKind = "none"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("*_proj",)
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._value_problems()]
        if problems:
            raise HymbaError("adapter config: " + "; ".join(problems))

    def _value_problems(self) -> Iterator[str]:
        yield from bound_problems(self, _BOUNDS)
        if not self.targets:
            yield "targets is empty: name a projection"
        if self:
            return
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                yield f"{item.name} is {shown(value)}, and kind none does not use it: name a kind"

    def __bool__(self) -> bool:
        """Whether there is an adapter."""
        return self.kind != "none"

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.kind == "rslora" else self.rank)


NO_ADAPTER = AdapterConfig()
"""The model's own parameters alone."""
