"""Pallas kernels in the interpreter, where no accelerator runs them."""

import pytest
from jax.experimental import pallas as pl


def interpret_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has all kernels interpreted; the names of those that are called from then on."""
    called: list[str] = []
    pallas_call = pl.pallas_call

    def interpreted(*args, name, **kwargs):
        called.append(name)
        return pallas_call(*args, name=name, interpret=True, **kwargs)

    monkeypatch.setattr(pl, "pallas_call", interpreted)
    return called
