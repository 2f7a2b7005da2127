"""The architecture of a Hymba: one frozen object, validated when built."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin

from hymba_jax.errors import HymbaError
from hymba_jax.field_types import describe, fits
from hymba_jax.layer_pattern import LayerSpec, Segment, format_pattern, hymba_pattern, parse_pattern

type Auto = Literal["auto"]
RopeType = Literal["default", "ntk", "dynamic_ntk"]
DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "block", "dots"]
QKNorm = Literal["none", "rms", "perhead-rms"]
Fusion = Literal["mean", "concat"]
MLPActivation = Literal["silu", "relu2"]


class ConfigError(HymbaError):
    """A configuration that describes nothing that can be built; lists every reason."""


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
      rope_type: "default"; "ntk", a larger base for max_positions; or "dynamic_ntk", a base that
        follows the length of the sequence.
      rope_theta: base of the rotary frequencies.
      rope_original_positions: positions that the base was meant for, before "ntk" stretches it.
    """

    num_heads: int = 25
    num_kv_heads: int = 5
    head_dim: int | Auto = "auto"
    value_dim: int | Auto = "auto"
    window: int = 1024
    qk_norm: QKNorm = "none"
    rope_type: RopeType = "ntk"
    rope_theta: float = 10000.0
    rope_original_positions: int = 2048


@dataclass(frozen=True)
class SSMConfig:
    """The Mamba heads (arXiv 2312.00752).

    Attributes:
      expand: SSM channels per hidden channel.
      state_size: states per SSM channel.
      conv_kernel: taps of the causal convolution.
      dt_rank: width of the time step before its projection; "auto" is ceil(hidden_size / 16).
    """

    expand: int = 2
    state_size: int = 16
    conv_kernel: int = 4
    dt_rank: int | Auto = "auto"


@dataclass(frozen=True)
class HymbaConfig:
    """The architecture; the defaults are the released 1.5B.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      mlp_size: inner width of the MLP.
      layers: the layers' pattern, see `hymba_jax.layer_pattern`; kept in its shortest form.
      num_meta_tokens: learned tokens before every text.
      max_positions: longest text, in tokens; meta tokens not counted.
      fusion: how the outputs of the two kinds of head are joined: the mean of the paper's
        equation 2, or concatenation (row 11 of its Tab. 1).
      mlp_activation: "silu" gates (SwiGLU); "relu2" has no gate.
      tie_embeddings: the output projection is the embedding.
      norm_eps: added to the mean square in every RMSNorm.
      bos_token_id, eos_token_id, pad_token_id: the tokenizer's special tokens.

    Raises:
      ConfigError: naming every value that cannot be.
    """

    vocab_size: int = 32001
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
        problems = [*_type_problems(self)]
        if not problems:
            problems = [*self._value_problems()]
        if problems:
            raise ConfigError("the model cannot be built: " + "; ".join(problems))
        object.__setattr__(self, "layers", format_pattern(parse_pattern(self.layers)))

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The layers as runs of equal units."""
        return parse_pattern(self.layers)

    @functools.cached_property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The layers, one by one."""
        return tuple(spec for segment in self.segments for spec in segment.unit * segment.repeats)

    @property
    def num_layers(self) -> int:
        return len(self.layer_specs)

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

    def resolved(self) -> "HymbaConfig":
        """The same architecture with every "auto" replaced by its number."""
        attention = dataclasses.replace(
            self.attention, head_dim=self.head_dim, value_dim=self.value_dim
        )
        ssm = dataclasses.replace(self.ssm, dt_rank=self.dt_rank)
        return dataclasses.replace(self, attention=attention, ssm=ssm)

    def _value_problems(self) -> Iterator[str]:
        yield from _not_positive(self, "vocab_size", "hidden_size", "mlp_size", "max_positions")
        yield from _not_positive(
            self.attention, "num_heads", "num_kv_heads", "window", "rope_original_positions"
        )
        yield from _not_positive(self.attention, "head_dim", "value_dim", "rope_theta")
        yield from _not_positive(self.ssm, "expand", "state_size", "conv_kernel", "dt_rank")
        yield from _not_positive(self, "norm_eps")
        if self.num_meta_tokens < 0:
            yield f"num_meta_tokens is {self.num_meta_tokens}, below 0"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < max(self.vocab_size, 1):
                yield f"{name} {getattr(self, name)} is outside the vocabulary of {self.vocab_size}"
        try:
            segments = parse_pattern(self.layers)
        except ValueError as error:
            yield f"layers {self.layers!r}: {error}"
        else:
            yield from self._head_problems([spec for run in segments for spec in run.unit])

    def _head_problems(self, specs: list[LayerSpec]) -> Iterator[str]:
        """What is wrong with the heads; nothing is if no layer has attention."""
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
        if self.attention.rope_type == "ntk" and original >= 2 * self.max_positions:
            yield (
                f"rope_original_positions {original} is not below twice max_positions "
                f"{self.max_positions}, so ntk has no base"
            )


@dataclass(frozen=True)
class ComputeConfig:
    """How a model computes; none of it changes what the model is.

    Attributes:
      dtype: of activations and matrix products. Norms, rotary angles, softmax, the time step, the
        SSM state, logits and loss are float32 whatever it is.
      param_dtype: of the stored parameters; the SSM's A_log, D and time-step bias stay float32.
      remat: what the backward pass recomputes: "none" keeps every activation, "block" only the
        input of each block, "dots" the results of matrix products.
      scan_layers: roll repeated units into a scan over stacked parameters.
    """

    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: Remat = "none"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        problems = [*_type_problems(self)]
        if problems:
            raise ConfigError("cannot compute so: " + "; ".join(problems))


def _either(value: int | Auto, default: int) -> int:
    return default if value == "auto" else value


def _not_positive(config: object, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(config, name)
        if value != "auto" and not value > 0:
            yield f"{name} is {value}, not above 0"


def _type_problems(config: object) -> Iterator[str]:
    """Values of the wrong type, in this config and its parts."""
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _type_problems(value)
        elif not fits(value, item.type):
            choices = get_args(item.type) if get_origin(item.type) is Literal else ()
            wanted = f"one of {', '.join(choices)}" if choices else describe(item.type)
            yield f"{item.name} is {value!r}, not {wanted}"


# Paper, Tab. 10 and appendix. Only the 1.5B has been released.
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
