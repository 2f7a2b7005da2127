"""Patterns of layers, spelt out."""

import dataclasses

import pytest

from hymba_jax.config.layer_pattern import LayerSpec, format_pattern, hymba_pattern, parse_pattern


def specs(pattern):
    return [spec for group in parse_pattern(pattern) for spec in group.layers * group.repeats]


def test_every_letter():
    assert specs("Gg Ww Aa Ll M S") == [
        LayerSpec("global", ssm="mamba"),
        LayerSpec("global", ssm="mamba", reuses_kv=True),
        LayerSpec("window", ssm="mamba"),
        LayerSpec("window", ssm="mamba", reuses_kv=True),
        LayerSpec("global", ssm=None),
        LayerSpec("global", ssm=None, reuses_kv=True),
        LayerSpec("window", ssm=None),
        LayerSpec("window", ssm=None, reuses_kv=True),
        LayerSpec(None, ssm="mamba"),
        LayerSpec(None, ssm="mamba2"),
    ]


def test_layers_without_an_mlp():
    attention, mamba2 = LayerSpec("global", ssm=None, mlp=False), LayerSpec(None, "mamba2")
    assert specs("A-a S-") == [
        attention,
        LayerSpec("global", ssm=None, reuses_kv=True),
        dataclasses.replace(mamba2, mlp=False),
    ]
    assert specs("2*A-M") == [attention, LayerSpec(None, ssm="mamba")] * 2


@pytest.mark.parametrize(
    ("written", "shortest"),
    [
        ("Ww Ww 2*Ww", "4*Ww"),
        ("1*G  Www", "G Www"),
        ("G G W W", "2*G 2*W"),
        ("3*GWWW GWWW", "4*GWWW"),
        ("A-M A-M S- S S-", "2*A-M S- S S-"),
    ],
)
def test_equal_neighbours_merge(written, shortest):
    assert format_pattern(parse_pattern(written)) == shortest
    assert specs(written) == specs(shortest)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "no layers"),
        ("G Xx", "unknown layer X, x"),
        ("0*G", "'0\\*G' is not a layer group"),
        ("G*2", "is not a layer group"),
        ("w", "'w' in 'w' reuses keys and values"),
        ("Wg", "the layer before it has no global attention"),
        ("Gw", "the layer before it has no window attention"),
        ("WMw", "'w' in 'WMw' reuses"),
        ("W w", "'w' in 'w' reuses"),
        ("A--", "'A--' is not a layer group"),
        ("-A", "'-A' is not a layer group"),
        ("W-g-", "'g-' in 'W-g-' reuses"),
    ],
)
def test_impossible_patterns(pattern, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(pattern)


def test_the_paper_at_its_own_depths():
    """Global and sharing layers of the HF config.json (32), and the same rule at 24."""
    assert hymba_pattern(32) == "G 7*Ww G Www 6*Ww G"
    assert hymba_pattern(24) == "G 5*Ww G Www 4*Ww G"
    assert [hymba_pattern(depth) for depth in (1, 2, 3)] == ["G", "2*G", "G W G"]


@pytest.mark.parametrize("depth", range(1, 50))
def test_the_rule_at_any_depth(depth):
    layers = specs(hymba_pattern(depth))
    assert len(layers) == depth
    is_global = {i for i, spec in enumerate(layers) if spec.attention == "global"}
    assert {0, depth - 1} <= is_global
    assert len(is_global) <= 3
    assert not any(layers[i].reuses_kv for i in is_global)
    alone = [
        i
        for i, spec in enumerate(layers)
        if spec.attention == "window"
        and not spec.reuses_kv
        and not (i + 1 < depth and layers[i + 1].reuses_kv)
    ]
    assert all(i - 1 in is_global and i + 1 in is_global for i in alone)
