"""Fields of a config that a command does not offer."""

import inspect
from collections.abc import Callable
from typing import Any


def without(kind: type[Any], *names: str) -> Callable[..., Any]:
    """A constructor of `kind` that hides those fields from the command line."""

    # Not a `def`: checking types at run time wraps those, and tyro looks into what is wrapped.
    make: Any = lambda **fields: kind(**fields)  # noqa: E731
    fields = inspect.signature(kind).parameters.values()
    kept = [field for field in fields if field.name not in names]
    make.__signature__ = inspect.Signature(kept)
    make.__annotations__ = {field.name: field.annotation for field in kept}
    make.__name__, make.__doc__ = kind.__name__, kind.__doc__
    return make
