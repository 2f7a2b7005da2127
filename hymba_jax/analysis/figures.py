"""The analyses as pictures, each on matplotlib axes that the caller has made.

Colors are of middle lightness, for light and dark backgrounds.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hymba_jax.analysis.attention_mass import KINDS, AttentionMass
from hymba_jax.analysis.magnitudes import SIDES, Magnitudes
from hymba_jax.analysis.receptive_field import ReceptiveField
from hymba_jax.config import DType, HymbaConfig
from hymba_jax.inference.memory import cache_bytes
from hymba_jax.types import Array, Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "meta": "#8e6bd1",
    "bos": "#d9962b",
    "self": "#3e9c74",
    "cross": "#3f86d1",
    "attention": "#3f86d1",
    "ssm": "#e0733d",
}
"""By what is drawn; the two kinds of heads have the same in all figures."""

LABELS = {"meta": "meta tokens", "bos": "first token", "self": "itself", "cross": "other tokens"}
LABELS |= {"attention": "attention heads", "ssm": "SSM heads"}

_MAX_BARS = 64  # that can be told apart


def draw_attention_mass(axis: "Axes", mass: AttentionMass) -> None:
    """Where the attention of each head goes (Fig. 7); of too many heads their mean by layer."""
    values = mass.mass if mass.mass[..., 0].size <= _MAX_BARS else mass.mass.mean(1, keepdims=True)
    layers, heads, _ = values.shape
    # A layer's heads stand side by side around the layer's number.
    offsets = (np.arange(heads) - (heads - 1) / 2) * 0.86 / heads
    x = (np.arange(layers)[:, None] + offsets).ravel()
    bottom = np.zeros(len(x))
    for i, kind in enumerate(KINDS):
        height = values[..., i].ravel()
        axis.bar(x, height, 0.78 / heads, bottom, color=COLORS[kind], label=LABELS[kind])
        bottom += height
    axis.set_ylim(0, 1)
    axis.set_ylabel("share of attention")
    _layer_axis(axis, layers, "a bar per head" if heads > 1 else "mean of all heads")
    _legend_above(axis)


def draw_entropy(axis: "Axes", mass: AttentionMass) -> None:
    """The entropy of each head's attention, in nats, and the mean of each layer."""
    layers = np.arange(len(mass.entropy))
    for head in mass.entropy.T:
        axis.plot(layers, head, "o", color=COLORS["attention"], alpha=0.45, markersize=4)
    axis.plot(layers, mass.entropy.mean(1), "_", color=COLORS["ssm"], markersize=18, mew=2)
    axis.set_ylim(0)
    axis.set_ylabel("entropy, nats")
    _layer_axis(axis, len(layers), "a dot per head, their mean as a bar")


def draw_maps(
    axes: Sequence["Axes"],
    attention: Float[Array, "heads positions positions"],
    ssm: Float[Array, "positions positions"],
    num_meta_tokens: int,
) -> None:
    """Three maps of one layer and sequence (Fig. 6): attention heads, SSM heads, both.

    Args:
      axes: three.
      attention: its mean over heads is drawn.
      ssm: its rows are scaled to sum to 1, as those of attention do; "both" is the mean.
    """
    mean = np.asarray(attention, np.float64).mean(0)
    scan = np.asarray(ssm, np.float64)
    scan = scan / scan.sum(-1, keepdims=True)
    titles = (LABELS["attention"], LABELS["ssm"], "both")
    for axis, title, weights in zip(axes, titles, (mean, scan, (mean + scan) / 2), strict=True):
        # The square root shows small weights, too.
        axis.imshow(np.sqrt(weights), vmin=0, vmax=0.6, cmap="magma", interpolation="nearest")
        if num_meta_tokens:
            axis.axvline(num_meta_tokens - 0.5, color="white", linewidth=0.8, linestyle=":")
            axis.axhline(num_meta_tokens - 0.5, color="white", linewidth=0.8, linestyle=":")
        axis.set_title(title)
        axis.set_xlabel("from position")
    axes[0].set_ylabel("to position")


def draw_importance(
    axis: "Axes", whole: float, without: Float[np.ndarray, "layers sides"], what: str
) -> None:
    """How an evaluation changes without one kind of heads of a layer (Figs. 3 and 13).

    Args:
      whole, without: as `head_importance` returns them.
      what: the evaluation's name and unit.
    """
    _draw_sides(axis, without - whole, prefix="without ")
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set_ylabel(f"change of {what}")


def draw_magnitudes(axes: Sequence["Axes"], magnitudes: Magnitudes) -> None:
    """Mean absolute outputs of both kinds of heads before and after their norms (Fig. 12).

    Args:
      axes: two.
    """
    for axis, values, place in zip(
        axes, magnitudes, ("before the norms", "after them, times beta"), strict=True
    ):
        _draw_sides(axis, values, note=place)
        axis.set_ylabel("mean |output|")


def draw_betas(axis: "Axes", betas: Sequence[Float[np.ndarray, "sides channels"] | None]) -> None:
    """The beta vectors of each layer: their median, and the range of 80% of the channels; nothing
    of layers that do not have both kinds of heads."""
    for i, side in enumerate(SIDES):
        low, middle, high = np.transpose(
            [
                np.full(3, np.nan) if beta is None else np.percentile(np.abs(beta[i]), (10, 50, 90))
                for beta in betas
            ]
        )
        x = np.arange(len(betas)) + (i - 0.5) * 0.24
        error = np.stack([middle - low, high - middle])
        axis.errorbar(x, middle, error, fmt="o", color=COLORS[side], label=LABELS[side], capsize=3)
    axis.set_ylim(0)
    axis.set_ylabel("|beta|")
    _legend_above(axis)
    _layer_axis(axis, len(betas), "median, and 80% of the channels")


def draw_receptive_field(axis: "Axes", fields: Sequence[ReceptiveField]) -> None:
    """How much the last token's output depends on each token before it: the mean of sequences.

    Args:
      fields: of sequences of one length.
    """
    shares = np.mean([field.strength / field.strength.sum() for field in fields], axis=0)
    distance = float(np.mean([field.distance for field in fields]))
    axis.plot(np.arange(len(shares))[::-1], shares, color=COLORS["attention"])
    axis.axvline(distance, color=COLORS["ssm"], linestyle="--", label=f"mean {distance:.0f}")
    axis.set_yscale("log")
    axis.set_xlabel("tokens back from the last one")
    axis.set_ylabel("share of the gradient")
    axis.legend(frameon=False)


def draw_cache(axis: "Axes", config: HymbaConfig, dtype: DType) -> None:
    """The cache of one sequence over its context, by purpose; SSM states in float32."""
    contexts = np.linspace(1, config.max_positions, 65).astype(int)
    sizes = [cache_bytes(config, int(context), dtype, "float32") for context in contexts]
    bottom = np.zeros(len(contexts))
    colors = {"global": "cross", "window": "meta"}
    for purpose in sizes[-1]:
        values = np.array([size[purpose] / 1e6 for size in sizes])
        kind = colors.get(purpose.partition(" ")[0], "self" if "conv" in purpose else "ssm")
        label = purpose.rpartition(", ")[0]
        axis.fill_between(contexts, bottom, bottom + values, color=COLORS[kind], label=label)
        bottom += values
    axis.set_xlim(0, config.max_positions)
    axis.set_ylim(0)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("MB of one sequence")
    axis.legend(frameon=False, loc="upper left")


def _draw_sides(
    axis: "Axes", values: Float[np.ndarray, "layers sides"], *, prefix: str = "", note: str = ""
) -> None:
    """Two bars for each layer, whose labels have the prefix."""
    for i, side in enumerate(SIDES):
        x = np.arange(len(values)) + (i - 0.5) * 0.38
        axis.bar(x, values[:, i], 0.36, color=COLORS[side], label=prefix + LABELS[side])
    _layer_axis(axis, len(values), note)
    _legend_above(axis)


def _legend_above(axis: "Axes") -> None:
    """A legend in one row, which hides nothing."""
    columns = len(axis.get_legend_handles_labels()[1])
    axis.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=columns,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.2,
    )


def _layer_axis(axis: "Axes", layers: int, note: str = "") -> None:
    """Layers counted from 1, some of them numbered."""
    step = -(-layers // 16)
    axis.set_xticks(range(0, layers, step), [str(i + 1) for i in range(0, layers, step)])
    axis.set_xlim(-0.6, layers - 0.4)
    axis.set_xlabel(f"layer ({note})" if note else "layer")
