"""The figures of the paper, of this model and one text."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hymba_jax.analysis.attention_mass import attention_mass
from hymba_jax.analysis.figures import (
    draw_attention_mass,
    draw_betas,
    draw_entropy,
    draw_importance,
    draw_magnitudes,
    draw_maps,
    draw_receptive_field,
)
from hymba_jax.analysis.importance import head_importance
from hymba_jax.analysis.magnitudes import beta_vectors, output_magnitudes
from hymba_jax.analysis.maps import attention_maps, ssm_maps
from hymba_jax.analysis.receptive_field import receptive_field
from hymba_jax.data import Batch
from hymba_jax.model import Hymba
from hymba_jax.report.page import Picture, Section
from hymba_jax.report.svg import new_figure
from hymba_jax.training.loss import next_token_loss
from hymba_jax.types import Array, Float, Int

_MAP_TOKENS = 96  # so that a position is a visible square


def analyses_section(
    model: Hymba, tokens: Int[Array, "sequences length"], text_name: str
) -> Section:
    """All figures that the model's layers have something to show in."""
    sequences, length = tokens.shape
    intro = (
        f"Figures as the paper has them, of this model reading {sequences} sequences of {length} "
        f"tokens of {text_name}. One short text says what these layers do with it, and little "
        "about other texts."
    )
    pictures = [*_attention(model, tokens), *_maps(model, tokens), *_heads(model, tokens)]
    return Section("Looking inside", intro, [*pictures, _reach(model, tokens)])


def _attention(model: Hymba, tokens: Int[Array, "sequences length"]) -> Iterator[Picture]:
    mass = attention_mass(model, tokens)
    if np.isnan(mass.entropy).all():
        return
    figure = new_figure(9, 5)
    shares, entropy = figure.subplots(2, 1)
    draw_attention_mass(shares, mass)
    draw_entropy(entropy, mass)
    yield Picture(
        "Where attention goes",
        "Above, the weights by what they are on; below, how widely they are spread. In the paper "
        "(Fig. 7) meta tokens take most of what otherwise piles up on the first token.",
        figure,
    )


def _maps(model: Hymba, tokens: Int[Array, "sequences length"]) -> Iterator[Picture]:
    part = tokens[:1, :_MAP_TOKENS]
    layers = _hybrid_with_map(model)
    if not layers:
        return
    shown = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    figure = new_figure(9, 3.1 * len(shown))
    rows = iter(figure.subplots(len(shown), 3, squeeze=False))
    maps = zip(attention_maps(model, part), ssm_maps(model, part), strict=True)
    for layer, (attention, ssm) in enumerate(maps):
        if layer in shown and attention is not None and ssm is not None:
            axes = next(rows)
            draw_maps(axes, attention[0], ssm[0], model.config.num_meta_tokens)
            axes[0].set_ylabel(f"layer {layer + 1}, to position")
    yield Picture(
        "Attention and SSM heads as maps",
        "Each row of a map says where a position takes from: the weights of attention, the scan "
        "written as weights, and the mean of both. Dotted lines end the meta tokens. In the paper "
        "(Fig. 6) the two kinds of heads complement each other.",
        figure,
    )


def _hybrid_with_map(model: Hymba) -> list[int]:
    """The layers that have attention heads, and Mamba heads beside them."""
    return [
        i
        for i, spec in enumerate(model.config.layer_specs)
        if spec.attention and spec.ssm == "mamba"
    ]


def _heads(model: Hymba, tokens: Int[Array, "sequences length"]) -> Iterator[Picture]:
    betas = beta_vectors(model)
    if all(beta is None for beta in betas):
        return
    loss = nnx.jit(_loss)
    whole, without = head_importance(model, lambda changed: float(loss(changed, tokens)))
    figure = new_figure(9, 3.2)
    draw_importance(figure.subplots(), whole, without, "loss, nats per token")
    yield Picture(
        "Importance of the heads of each layer",
        f"The loss on this text is {whole:.3f} nats per token; a bar is what it gains without one "
        "kind of heads of one layer. In the paper (Figs. 3 and 13) SSM heads matter most in the "
        "first layer, without which the model is lost.",
        figure,
    )
    figure = new_figure(9, 3.2)
    draw_magnitudes(figure.subplots(1, 2), output_magnitudes(model, tokens))
    yield Picture(
        "Outputs of both kinds of heads",
        "Their mean magnitudes before and after the norms that make them alike. In the paper "
        "(Fig. 12) the outputs of SSM heads are the larger ones before.",
        figure,
    )
    figure = new_figure(9, 2.8)
    draw_betas(figure.subplots(), betas)
    yield Picture(
        "Beta vectors",
        "The learned scales of the two norms, which weigh attention against SSM heads, channel by "
        "channel; they start at 1.",
        figure,
    )


def _reach(model: Hymba, tokens: Int[Array, "sequences length"]) -> Picture:
    field = receptive_field(model, tokens[0])
    figure = new_figure(9, 3)
    draw_receptive_field(figure.subplots(), [field])
    return Picture(
        "Effective receptive field",
        f"How much the output at the last of {tokens.shape[1]} tokens depends on each of them: "
        f"on average it reaches back {field.distance:.0f} tokens. The paper's Fig. 11 compares "
        "designs by this distance.",
        figure,
    )


def _loss(model: Hymba, tokens: Int[Array, "sequences length"]) -> Float[Array, ""]:
    return jnp.asarray(next_token_loss(model, Batch(tokens[:, :-1], tokens[:, 1:]))["loss"].mean)
