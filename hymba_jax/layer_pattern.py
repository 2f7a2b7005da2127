"""What differs between layers, as data.

A model's layers are written as a pattern, the way the paper draws them (Fig. 2):

    G 7*Ww G Www 6*Ww G

Each letter is a layer. Each word is a unit: layers that stand together, the first of which needs
nothing from outside. `7*` repeats a unit, and repeated units are compiled once.

| letter | attention heads           | SSM heads |
|--------|---------------------------|-----------|
| G      | global                    | yes       |
| W      | sliding window            | yes       |
| A      | global                    | no        |
| L      | sliding window ("local")  | no        |
| M      | none                      | yes       |

A small letter reuses the keys and values of the layer before it (paper, section 2.3).
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hymba_jax.field_types import shown

type Attention = Literal["global", "window"]

MOST_LAYERS = 4096
"""No model is nearly as deep, and a program has to be compiled for each unit."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer: which heads it has, and whether it reuses the keys and values before it."""

    attention: Attention | None
    ssm: bool
    reuses_kv: bool = False


@dataclass(frozen=True)
class Segment:
    """`repeats` equal units in a row, each a few layers that share nothing with the outside."""

    unit: tuple[LayerSpec, ...]
    repeats: int

    @property
    def num_layers(self) -> int:
        return len(self.unit) * self.repeats


_LETTERS = {
    "G": LayerSpec("global", ssm=True),
    "W": LayerSpec("window", ssm=True),
    "A": LayerSpec("global", ssm=False),
    "L": LayerSpec("window", ssm=False),
    "M": LayerSpec(None, ssm=True),
    "g": LayerSpec("global", ssm=True, reuses_kv=True),
    "w": LayerSpec("window", ssm=True, reuses_kv=True),
    "a": LayerSpec("global", ssm=False, reuses_kv=True),
    "l": LayerSpec("window", ssm=False, reuses_kv=True),
}
_SPECS = {spec: letter for letter, spec in _LETTERS.items()}


def parse_pattern(pattern: str) -> tuple[Segment, ...]:
    """The segments of a pattern, equal neighbours merged.

    Raises:
      ValueError: the pattern is empty, has an unknown letter or too many layers, or a layer reuses
        keys and values that no layer before it in its unit produces in the same kind of attention.
    """
    segments: list[Segment] = []
    num_layers = 0
    for word in pattern.split():
        match = re.fullmatch(r"(?:([1-9][0-9]*)\*)?([A-Za-z]+)", word)
        if match is None:
            raise ValueError(f"{shown(word)} is not a unit such as Ww or 7*Ww")
        repeats = int((match[1] or "1")[:9])  # enough to be too many
        num_layers += repeats * len(match[2])
        if num_layers > MOST_LAYERS:
            raise ValueError(f"with {shown(word)} there are more than {MOST_LAYERS} layers")
        unit = _parse_unit(match[2])
        if segments and segments[-1].unit == unit:
            repeats += segments.pop().repeats
        segments.append(Segment(unit, repeats))
    if not segments:
        raise ValueError("there are no layers")
    return tuple(segments)


def _parse_unit(letters: str) -> tuple[LayerSpec, ...]:
    unknown = sorted(set(letters) - set(_LETTERS))
    if unknown:
        raise ValueError(f"unknown layer {', '.join(unknown)} in {letters!r}; {_known_letters()}")
    unit = tuple(_LETTERS[letter] for letter in letters)
    for before, layer, letter in zip((None, *unit), unit, letters, strict=False):
        if layer.reuses_kv and (before is None or before.attention != layer.attention):
            raise ValueError(
                f"{letter!r} in {letters!r} reuses keys and values, but no {layer.attention} "
                "attention stands directly before it: a sharing group cannot cross another kind"
            )
    return unit


def _known_letters() -> str:
    return f"known are {' '.join(_LETTERS)}"


def format_pattern(segments: Sequence[Segment]) -> str:
    """The pattern of these segments; `parse_pattern` undoes it."""
    words = []
    for segment in segments:
        letters = "".join(_SPECS[layer] for layer in segment.unit)
        words.append(f"{segment.repeats}*{letters}" if segment.repeats > 1 else letters)
    return " ".join(words)


def hymba_pattern(num_layers: int) -> str:
    """The paper's arrangement at any depth.

    Global attention in the first, the middle and the last layer; sliding windows between them,
    in pairs that share keys and values, with a triple first where their number is odd.
    """
    global_layers = sorted({0, max(num_layers // 2 - 1, 0), num_layers - 1})
    words = ["G"]
    for left, right in itertools.pairwise(global_layers):
        between = right - left - 1
        if between == 1:
            words.append("W")
        elif between % 2:
            words += ["Www", *["Ww"] * ((between - 3) // 2)]
        else:
            words += ["Ww"] * (between // 2)
        words.append("G")
    return format_pattern(parse_pattern(" ".join(words)))
