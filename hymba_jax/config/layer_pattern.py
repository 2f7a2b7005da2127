"""What differs between layers, as data.

A model's layers are written as a pattern, the way the paper draws them (Fig. 2):

    G 7*Ww G Www 6*Ww G

Each letter is a layer. Each word is a layer group: consecutive layers, the first of which has its
own keys and values. `7*` repeats a group, and repeated groups are compiled once.

| letter | attention heads           | SSM heads |
|--------|---------------------------|-----------|
| G      | global                    | yes       |
| W      | sliding window            | yes       |
| A      | global                    | no        |
| L      | sliding window ("local")  | no        |
| M      | none                      | yes       |
| S      | none                      | Mamba2    |

A lower-case letter reuses the keys and values of the layer before it (paper, section 2.3). An MLP
follows the heads of every layer but those marked `-`: `48*S-` is Mamba2 as it was published, and
`16*A-M` has attention, Mamba and MLP one after the other, each with its own output projection.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hymba_jax.config.field_types import shown

type Attention = Literal["global", "window"]
type SSMKind = Literal["mamba", "mamba2"]

MAX_LAYERS = 4096
"""Far deeper than any model; each group is compiled separately."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer: which heads it has, whether it reuses the keys and values of the layer before, and
    whether an MLP follows."""

    attention: Attention | None
    ssm: SSMKind | None
    reuses_kv: bool = False
    mlp: bool = True


@dataclass(frozen=True)
class GroupSpec:
    """`repeats` equal groups in a row, whose layers share keys and values only within a group."""

    layers: tuple[LayerSpec, ...]
    repeats: int

    @property
    def num_layers(self) -> int:
        return len(self.layers) * self.repeats


_LETTERS = {
    "G": LayerSpec("global", ssm="mamba"),
    "W": LayerSpec("window", ssm="mamba"),
    "A": LayerSpec("global", ssm=None),
    "L": LayerSpec("window", ssm=None),
    "M": LayerSpec(None, ssm="mamba"),
    "S": LayerSpec(None, ssm="mamba2"),
    "g": LayerSpec("global", ssm="mamba", reuses_kv=True),
    "w": LayerSpec("window", ssm="mamba", reuses_kv=True),
    "a": LayerSpec("global", ssm=None, reuses_kv=True),
    "l": LayerSpec("window", ssm=None, reuses_kv=True),
}
_SPECS = {spec: letter for letter, spec in _LETTERS.items()}
_NO_MLP = "-"  # after a letter


def parse_pattern(pattern: str) -> tuple[GroupSpec, ...]:
    """The layer groups of a pattern, equal neighbours merged.

    Raises:
      ValueError: the pattern is empty, has an unknown letter or too many layers, or a layer reuses
        keys and values that no layer before it in its group produces in the same kind of attention.
    """
    groups: list[GroupSpec] = []
    num_layers = 0
    for word in pattern.split():
        match = re.fullmatch(r"(?:([1-9][0-9]*)\*)?((?:[A-Za-z]-?)+)", word)
        if match is None:
            raise ValueError(f"{shown(word)} is not a layer group such as Ww or 7*Ww")
        repeats = int((match[1] or "1")[:9])  # enough to be too many
        num_layers += repeats * sum(letter != _NO_MLP for letter in match[2])
        if num_layers > MAX_LAYERS:
            raise ValueError(f"with {shown(word)} there are more than {MAX_LAYERS} layers")
        layers = _parse_group(match[2])
        if groups and groups[-1].layers == layers:
            repeats += groups.pop().repeats
        groups.append(GroupSpec(layers, repeats))
    if not groups:
        raise ValueError("there are no layers")
    return tuple(groups)


def _parse_group(letters: str) -> tuple[LayerSpec, ...]:
    unknown = sorted(set(letters) - {*_LETTERS, _NO_MLP})
    if unknown:
        raise ValueError(f"unknown layer {', '.join(unknown)} in {letters!r}; {_known_letters()}")
    marked = re.findall(f".{_NO_MLP}?", letters)
    layers = tuple(
        dataclasses.replace(_LETTERS[letter[0]], mlp=letter[1:] != _NO_MLP) for letter in marked
    )
    for before, layer, letter in zip((None, *layers), layers, marked, strict=False):
        if layer.reuses_kv and (before is None or before.attention != layer.attention):
            raise ValueError(
                f"{letter!r} in {letters!r} reuses keys and values, but the layer before it has no "
                f"{layer.attention} attention: only adjacent layers of one kind can share them"
            )
    return layers


def _known_letters() -> str:
    return f"known are {' '.join(_LETTERS)}"


def format_pattern(groups: Sequence[GroupSpec]) -> str:
    """The pattern of these layer groups, the inverse of `parse_pattern`."""
    words = []
    for group in groups:
        letters = "".join(map(_format_layer, group.layers))
        words.append(f"{group.repeats}*{letters}" if group.repeats > 1 else letters)
    return " ".join(words)


def _format_layer(layer: LayerSpec) -> str:
    letter = _SPECS[dataclasses.replace(layer, mlp=True)]
    return letter if layer.mlp else letter + _NO_MLP


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
