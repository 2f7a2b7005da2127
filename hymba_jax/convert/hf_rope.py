"""RoPE in an HF config.json, in each of its spellings.

The HF implementation of Hymba writes `rope_type`, `rope_theta` and `orig_max_position_embeddings`;
transformers 5 writes an object `rope_parameters`; before, transformers had `rope_scaling`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hymba_jax.config import AttentionConfig
from hymba_jax.config.field_types import fits

SPELLINGS = ("rope_parameters", "rope_scaling")
# The HF implementation's key for each key of these objects.
_KEYS = {
    "rope_type": "rope_type",
    "type": "rope_type",
    "rope_theta": "rope_theta",
    "original_max_position_embeddings": "orig_max_position_embeddings",
}
_TYPES = {"rope_type": str, "rope_theta": float, "orig_max_position_embeddings": int}
ROPE_KEYS = (*_TYPES,)


class RopeSettings(NamedTuple):
    """As in `AttentionConfig`."""

    rope_type: str
    rope_theta: float
    rope_original_positions: int


def read_rope(hf: Mapping[str, Any]) -> tuple[RopeSettings, list[str]]:
    """The RoPE settings, and every problem with them in words.

    Args:
      hf: the config.json, whose own keys are of the right types.
    """
    problems = []
    given: dict[str, dict[str, Any]] = {key: {} for key in _TYPES}
    for key, places in given.items():
        if hf.get(key) is not None:
            places[key] = hf[key]
    for table in SPELLINGS:
        for name, value in (hf.get(table) or {}).items():
            place = f"{table}.{name}"
            if name not in _KEYS:
                if not (name == "partial_rotary_factor" and fits(value, float) and value == 1):
                    problems.append(f"{place} is {value!r}, which is not supported")
            elif not fits(value, _TYPES[_KEYS[name]]):
                problems.append(f"{place} is {value!r}, of a wrong type")
            else:
                given[_KEYS[name]][place] = value
    for places in given.values():
        if any(value != next(iter(places.values())) for value in places.values()):
            listed = ", ".join(f"{place} is {value!r}" for place, value in places.items())
            problems.append(f"{listed}: they contradict each other, keep one")

    values = {key: next(iter(places.values()), None) for key, places in given.items()}
    kind, original = values["rope_type"], values["orig_max_position_embeddings"]
    if kind is None and "rope_type" not in hf:
        problems.append("rope_type is missing (null is RoPE without scaling)")
    kind = kind or "default"
    if kind not in ("default", "ntk", "dynamic_ntk"):
        problems.append(f"rope_type is {kind!r}, not default, ntk or dynamic_ntk")
    if kind in ("ntk", "dynamic_ntk") and original is None:
        problems.append(f"orig_max_position_embeddings is missing, which rope_type {kind!r} needs")
    defaults = AttentionConfig()
    rope = RopeSettings(
        kind,
        defaults.rope_theta if values["rope_theta"] is None else values["rope_theta"],
        defaults.rope_original_positions if original is None else original,
    )
    return rope, problems
