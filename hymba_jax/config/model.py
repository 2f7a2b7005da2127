"""The architecture of a Hymba: one frozen object, validated when built."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from hymba_jax.config.field_types import Bounds, bound_problems, shown, type_problems
from hymba_jax.config.layer_pattern import (
    GroupSpec,
    LayerSpec,
    format_pattern,
    hymba_pattern,
    parse_pattern,
)
from hymba_jax.errors import HymbaError

type Auto = Literal["auto"]
RopeType = Literal["auto", "default", "ntk", "dynamic_ntk"]
DType = Literal["float32", "bfloat16"]
WeightFormat = Literal["float", "int8"]
CacheFormat = Literal["float", "int8"]
Remat = Literal["none", "block", "kernels", "dots", "activations"]
QKNorm = Literal["none", "rms", "perhead-rms"]
Fusion = Literal["mean", "concat"]
MLPActivation = Literal["silu", "relu2"]

_WIDTH = Bounds(1, 2**17, "a single layer would take hundreds of gigabytes")
_LENGTH = Bounds(1, 2**23, "RoPE counts positions in float32, which is exact up to 2^24")
_TOKEN = Bounds(0, 2**24 - 1, "no tokenizer has so many tokens")

ATTENTION_BOUNDS = {
    "num_heads": Bounds(1, 2**15, "the widest layer has no more heads of 4 channels"),
    "num_kv_heads": Bounds(1, 2**15, "the widest layer has no more heads of 4 channels"),
    "head_dim": Bounds(1, 2**12, "no kernel supports wider heads"),
    "value_dim": Bounds(1, 2**12, "no kernel supports wider heads"),
    "window": _LENGTH,
    "rope_theta": Bounds(
        1,
        1e12,
        "its frequencies, powers of 1 / rope_theta, have to stay apart in float32",
        "its frequencies, powers of 1 / rope_theta, have to fall from one pair to the next",
    ),
    "rope_original_positions": _LENGTH,
}
SSM_BOUNDS = {
    "expand": Bounds(1, 2**6, "a single layer would take hundreds of gigabytes"),
    "state_size": Bounds(1, 2**12, "no kernel supports more states per channel"),
    "conv_kernel": Bounds(1, 2**10, "longer ranges are for attention"),
    "dt_rank": _WIDTH,
    "head_dim": _WIDTH,
    "groups": _WIDTH,
}
MODEL_BOUNDS = {
    "vocab_size": _TOKEN._replace(at_least=1, at_most=2**24),
    "hidden_size": _WIDTH,
    "mlp_size": _WIDTH._replace(at_most=2**20),
    "num_meta_tokens": _LENGTH._replace(at_least=0),
    "max_positions": _LENGTH,
    "norm_eps": Bounds(
        1e-20,
        0.1,
        "it would dominate the mean square, which is about 1",
        "the norm's gradient contains norm_eps^(-3/2), which overflows float32",
    ),
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
}


class ConfigError(HymbaError):
    """An invalid architecture; lists every problem."""


@dataclass(frozen=True)
class AttentionConfig:
    """The attention heads.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key/value heads; query head h reads key/value head h // (heads // kv_heads).
      head_dim: width of a query or key head; "auto" is hidden_size / num_heads.
      value_dim: width of a value head; "auto" is SSM channels / num_heads, so that both kinds of
        head yield the same width and can be averaged.
      window: a window layer sees this many tokens before each token, the token itself, and every
        meta token.
      qk_norm: RMSNorm of queries and keys before rotation: none, one weight for all heads, or a
        weight per head.
      rope_type: "default"; "ntk", a larger base for max_positions; "dynamic_ntk", a base that
        follows the length of the sequence; or "auto", which is "ntk" where max_positions is above
        rope_original_positions and "default" elsewhere.
      rope_theta: base of the rotary frequencies, rope_theta^(-2i / head_dim) for pair i.
      rope_original_positions: positions that the base was meant for. "ntk" multiplies it by
        (2 max_positions / rope_original_positions - 1)^(head_dim / (head_dim - 2)), which is 1
        where both are equal.
    """

    num_heads: int = 25
    num_kv_heads: int = 5
    head_dim: int | Auto = "auto"
    value_dim: int | Auto = "auto"
    window: int = 1024
    qk_norm: QKNorm = "none"
    rope_type: RopeType = "auto"
    rope_theta: float = 10000.0
    rope_original_positions: int = 2048


@dataclass(frozen=True)
class SSMConfig:
    """The SSM heads: Mamba (arXiv 2312.00752) or Mamba2 (arXiv 2405.21060).

    Attributes:
      expand: SSM channels per hidden channel.
      state_size: states per SSM channel.
      conv_kernel: taps of the causal convolution.
      dt_rank: width of Mamba's time step before its projection; "auto" is ceil(hidden_size / 16).
      head_dim: channels of a Mamba2 head, which share a time step and a decay.
      groups: of Mamba2 heads; those of a group share B and C. Head h is of group
        h // (heads / groups).
    """

    expand: int = 2
    state_size: int = 16
    conv_kernel: int = 4
    dt_rank: int | Auto = "auto"
    head_dim: int = 64
    groups: int = 1


@dataclass(frozen=True)
class HymbaConfig:
    """The architecture; the defaults are those of the HF checkpoint, 1.5B.

    Attributes:
      vocab_size: rows of the embedding. "auto" (the default in a run) is the size of the run's
        tokenizer; the saved config has the number. A larger number pads the embedding. HF
        checkpoints, and presets without a tokenizer, have 32001.
      hidden_size: width of the residual stream.
      mlp_size: inner width of the MLP.
      layers: the layers' pattern, see `hymba_jax.config.layer_pattern`; kept in its shortest form.
      num_meta_tokens: learned tokens before every sequence.
      max_positions: maximum length of a sequence in tokens, without meta tokens.
      fusion: how the outputs of the two kinds of head are joined: the mean of the paper's
        equation 2, or concatenation (row 11 of its Tab. 1).
      mlp_activation: "silu" gates (SwiGLU); "relu2" has no gate.
      tie_embeddings: the output projection is the embedding.
      norm_eps: added to the mean square in every RMSNorm.
      bos_token_id: the tokenizer's beginning-of-sequence (BOS) token.
      eos_token_id: its end-of-sequence (EOS) token.
      pad_token_id: its padding token, which is never attended to.

    Raises:
      ConfigError: naming every invalid value.
    """

    vocab_size: int | Auto = 32001
    hidden_size: int = 1600
    mlp_size: int = 5504
    layers: str = "G 7*Ww G Www 6*Ww G"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ssm: SSMConfig = field(default_factory=SSMConfig)
    num_meta_tokens: int = 128
    max_positions: int = 8192
    fusion: Fusion = "mean"
    mlp_activation: MLPActivation = "silu"
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        problems = [*type_problems(self)] or [*self._value_problems()]
        if problems:
            raise ConfigError("the model cannot be built: " + "; ".join(problems))
        object.__setattr__(self, "layers", format_pattern(parse_pattern(self.layers)))

    @functools.cached_property
    def groups(self) -> tuple[GroupSpec, ...]:
        """The layers in groups, equal neighbours merged."""
        return parse_pattern(self.layers)

    @functools.cached_property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The layers, one by one."""
        return tuple(spec for group in self.groups for spec in group.layers * group.repeats)

    @property
    def num_layers(self) -> int:
        return len(self.layer_specs)

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding, V.

        Raises:
          ConfigError: vocab_size is "auto", and no tokenizer has been named yet.
        """
        if self.vocab_size == "auto":
            raise ConfigError('vocab_size is "auto": it needs a number where there is no tokenizer')
        return self.vocab_size

    @property
    def rope_type(self) -> RopeType:
        """How the base of the rotary frequencies is found, "auto" replaced by what it means."""
        attention = self.attention
        if attention.rope_type != "auto":
            return attention.rope_type
        return "ntk" if self.max_positions > attention.rope_original_positions else "default"

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies, for "dynamic_ntk" before it follows the length."""
        if self.rope_type != "ntk":
            return self.attention.rope_theta
        factor = 2 * self.max_positions / self.attention.rope_original_positions - 1
        return float(self.attention.rope_theta * factor**self.ntk_exponent)

    @property
    def max_fixed_positions(self) -> int | float:
        """Positions, meta tokens included, up to which rotation does not depend on the length."""
        if self.rope_type != "dynamic_ntk":
            return math.inf
        return self.attention.rope_original_positions

    @property
    def ntk_exponent(self) -> float:
        """The power to which the ntk forms raise their factor of the base."""
        return self.head_dim / max(self.head_dim - 2, 1)  # with 2 channels the base has no effect

    @property
    def head_dim(self) -> int:
        """Width of a query or key head, Dk."""
        return _either(self.attention.head_dim, self.hidden_size // self.attention.num_heads)

    @property
    def value_dim(self) -> int:
        """Width of a value head, Dv."""
        return _either(self.attention.value_dim, self.channels // self.attention.num_heads)

    @property
    def channels(self) -> int:
        """SSM channels, E."""
        return self.ssm.expand * self.hidden_size

    @property
    def ssm_heads(self) -> int:
        """Heads of Mamba2."""
        return self.channels // self.ssm.head_dim

    @property
    def attention_channels(self) -> int:
        """Width of the concatenated attention heads, Nq * Dv."""
        return self.attention.num_heads * self.value_dim

    @property
    def dt_rank(self) -> int:
        """Width of the time step before its projection, R."""
        return _either(self.ssm.dt_rank, -(-self.hidden_size // 16))

    def mixer_channels(self, spec: LayerSpec) -> int:
        """Width of what a layer's heads hand to its output projection."""
        if spec.attention and spec.ssm:
            concat = self.fusion == "concat"
            return self.channels + self.attention_channels if concat else self.channels
        return self.channels if spec.ssm else self.attention_channels

    def with_vocabulary(self, size: int) -> "HymbaConfig":
        """The same architecture with this vocab_size, unless it has a number already."""
        return dataclasses.replace(self, vocab_size=size) if self.vocab_size == "auto" else self

    def resolved(self) -> "HymbaConfig":
        """The same architecture with every "auto" replaced by what it means.

        But for that of vocab_size, which depends on a tokenizer.
        """
        attention = dataclasses.replace(
            self.attention,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            rope_type=self.rope_type,
        )
        ssm = dataclasses.replace(self.ssm, dt_rank=self.dt_rank)
        return dataclasses.replace(self, attention=attention, ssm=ssm)

    def _value_problems(self) -> Iterator[str]:
        yield from bound_problems(self, MODEL_BOUNDS)
        yield from bound_problems(self.attention, ATTENTION_BOUNDS)
        yield from bound_problems(self.ssm, SSM_BOUNDS)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if self.vocab_size != "auto" and token >= self.vocab_size:
                yield f"{name} {token} is outside the vocabulary of {self.vocab_size}"
        try:
            groups = parse_pattern(self.layers)
        except ValueError as error:
            yield f"layers {shown(self.layers)}: {error}"
        else:
            specs = [spec for group in groups for spec in group.layers]
            yield from self._head_problems(specs)
            yield from self._mamba2_problems(specs)

    def _head_problems(self, specs: list[LayerSpec]) -> Iterator[str]:
        """What is wrong with the heads; empty if no layer has attention."""
        heads, kv_heads = self.attention.num_heads, self.attention.num_kv_heads
        if not any(spec.attention for spec in specs) or min(heads, kv_heads, self.channels) < 1:
            return
        if heads % kv_heads:
            yield f"num_heads {heads} is not a multiple of num_kv_heads {kv_heads}"
        if self.attention.head_dim == "auto" and self.hidden_size % heads:
            yield f"hidden_size {self.hidden_size} is not a multiple of num_heads {heads}"
        elif self.head_dim % 2 or self.head_dim < 4:
            yield f"head_dim {self.head_dim} is not an even number of at least 4, as RoPE needs"
        if self.attention.value_dim == "auto" and self.channels % heads:
            yield f"the {self.channels} SSM channels are not a multiple of num_heads {heads}"
        elif (
            self.fusion == "mean"
            and self.attention_channels != self.channels
            and any(spec.attention and spec.ssm for spec in specs)
        ):
            yield (
                f"attention yields {heads} heads of {self.value_dim} and the SSM "
                f'{self.channels} channels: fusion "mean" needs equal widths, "concat" does not'
            )
        original = self.attention.rope_original_positions
        if self.rope_type != "ntk" or self.head_dim < 4 or min(original, self.max_positions) < 1:
            return
        if original >= 2 * self.max_positions:
            yield (
                f"rope_original_positions {original} is not below twice max_positions "
                f'{self.max_positions}, so "ntk" has no base: use rope_type "auto" or "default"'
            )
        elif not self.rope_base >= 1:
            yield (
                f'"ntk" makes a base of {self.rope_base:.2g} of rope_theta '
                f"{self.attention.rope_theta}, which has to be at least 1"
            )

    def _mamba2_problems(self, specs: list[LayerSpec]) -> Iterator[str]:
        """What is wrong with the heads of Mamba2; empty if no layer has them."""
        head_dim, groups = self.ssm.head_dim, self.ssm.groups
        is_used = any(spec.ssm == "mamba2" for spec in specs)
        if not is_used or min(head_dim, groups, self.channels) < 1:
            return
        if self.channels % head_dim:
            yield f"the {self.channels} SSM channels are not a multiple of ssm.head_dim {head_dim}"
        elif self.ssm_heads % groups:
            yield f"the {self.ssm_heads} SSM heads are not a multiple of ssm.groups {groups}"


@dataclass(frozen=True)
class ComputeConfig:
    """How a model computes; none of it changes what the model is.

    Attributes:
      dtype: of activations and matmuls. Norms, rotary angles, softmax, the time step after its
        projection, the SSM state, logits and loss are float32 whatever it is.
      param_dtype: of the stored parameters; the SSM's A_log, D and time-step bias stay float32.
        Training updates float32 copies of those that are not float32.
      remat: what the backward pass recomputes: "none" keeps every activation, "block" only the
        input of each block, "kernels" also what scan and attention compute, and "dots" the
        results of matmuls, too, so that no projection is run again. "activations" keeps what lies
        between matmuls as well, at its own precision: norms, convolution, gates.
      scan_layers: apply repeated layer groups by a scan over stacked parameters.
    """

    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: Remat = "none"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        problems = [*type_problems(self)]
        if problems:
            raise ConfigError("compute config: " + "; ".join(problems))


def _either(value: int | Auto, default: int) -> int:
    return default if value == "auto" else value


# Paper, Tab. 10 and appendix. Only the 1.5B has an HF checkpoint.
PRESETS = {
    "hymba-125m": HymbaConfig(
        hidden_size=512,
        mlp_size=1664,
        layers=hymba_pattern(24),
        attention=AttentionConfig(num_heads=8, num_kv_heads=4),
    ),
    "hymba-350m": HymbaConfig(
        hidden_size=768,
        mlp_size=2432,
        layers=hymba_pattern(32),
        attention=AttentionConfig(num_heads=12, num_kv_heads=4),
    ),
    "hymba-1.5b": HymbaConfig(),
}


def find_preset(name: str) -> HymbaConfig:
    """The architecture of this name.

    Raises:
      HymbaError: there is none.
    """
    if name not in PRESETS:
        raise HymbaError(f"preset is {shown(name)}, not one of {', '.join(PRESETS)}")
    return PRESETS[name]
