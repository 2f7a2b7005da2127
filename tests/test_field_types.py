"""What fields of configs accept, and the words for what they do not."""

import dataclasses
import json
from typing import Literal

import numpy as np
import pytest

from hymba_jax.config.field_types import Bounds, bound_problems, fits, misfit, type_problems

type Auto = Literal["auto"]


def repr_of_type(value):
    """Names a case, without writing long numbers out."""
    return type(value).__name__


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, int),
        (3, float),
        (3.5, float),
        (np.int32(3), int),
        (np.uint8(3), float),
        (np.float32(3.5), float),
        (np.bool_(True), bool),
        (np.str_("a"), str),
        (np.array(3), int),  # as JAX's scalars are
        (np.int64(3), int | Auto),
        ("auto", int | Auto),
        (None, int | None),
        (-(2**63), int),
    ],
)
def test_values_that_fit(value, kind):
    assert fits(value, kind)
    assert misfit(value, kind) is None


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (3.0, int, "is 3.0, not an integer"),
        (np.float64(3), int, "is 3.0, not an integer"),
        (True, int, "is True, not an integer"),
        (np.bool_(True), float, "is True, not a number"),
        (1, bool, "is 1, not true or false"),
        (float("inf"), float, "is inf, not finite"),
        (np.float32("nan"), float, "is nan, not finite"),
        (2**63, int, "is 9223372036854775808, beyond 64 bits"),
        (16**5000, int | Auto, "is a number of 20001 bits, beyond 64 bits"),
        (16**5000, float, "is a number of 20001 bits, beyond 64 bits"),
        (16**5000, str, "is a number of 20001 bits, not a string"),
        ([16**5000], int, "is [a number of 20001 bits], not an integer"),
        (np.ones(2), Auto, 'is array([1., 1.]), not "auto"'),
        (np.array([3]), int, "is array([3]), not an integer"),
        ("\udcff", str, "is '\\udcff', not Unicode"),
        ("x", int | None, "is 'x', not an integer or nothing"),
        ("x", tuple[str, ...], "is 'x', not a list of strings"),
        (["x", 1], tuple[str, ...], "is ['x', 1], not a list of strings"),
        (["\udcff"], tuple[str, ...], "is ['\\udcff'], not Unicode"),
    ],
    ids=repr_of_type,
)
def test_values_that_do_not(value, kind, message):
    assert misfit(value, kind) == message


def test_a_message_is_short_whatever_was_given():
    nested = []
    for _ in range(10_000):
        nested = [nested]
    for value in (nested, "x" * 10**6, {str(i): i for i in range(10**5)}):
        assert len(misfit(value, int)) < 500


@dataclasses.dataclass(frozen=True)
class Part:
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Example:
    size: int = 1
    rate: float = 0.5
    part: Part = Part()


BOUNDS = {"size": Bounds(1, 9, "no box is"), "rate": Bounds(0.1, 1, "", "too slow")}


def test_bounds_are_given_with_their_reason():
    assert [*bound_problems(Example(), BOUNDS)] == []
    assert [*bound_problems(Example(size=10, rate=0.01), BOUNDS)] == [
        "size is 10, above 9: no box is",
        "rate is 0.01, below 0.1: too slow",
    ]
    assert [*bound_problems(Example(size=0, rate=2), BOUNDS)] == [
        "size is 0, below 1",
        "rate is 2, above 1",
    ]


def test_every_wrong_type_is_named():
    assert [*type_problems(Example(size=1.5, part=Part("x")))] == [
        "size is 1.5, not an integer",
        "size is 'x', not an integer",
    ]
    assert [*type_problems(Example(part=3))] == ["part is 3, not a Part"]


def test_numpy_scalars_become_numbers_that_files_can_hold():
    example = Example(size=np.int64(3), rate=np.float32(0.25), part=Part(np.uint8(1)))
    assert [*type_problems(example)] == []
    written = json.dumps(dataclasses.asdict(example))
    assert written == '{"size": 3, "rate": 0.25, "part": {"size": 1}}'
