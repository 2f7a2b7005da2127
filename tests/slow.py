"""Cases that wait for `-m slow`."""

from collections.abc import Iterable

import pytest


def slow_but(names: Iterable[str], *quick: str) -> list:
    """The same cases, of which all but these few are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
