"""Contexts whose end can fail."""

from abc import ABC, abstractmethod
from types import TracebackType

from hymba_jax.errors import HymbaError


class Closing(ABC):
    """A context that is closed at its end.

    Where it ends with an error, that is the one to tell: another of closing it is dropped.
    """

    @abstractmethod
    def close(self) -> None:
        """Ends what is under way. Raises HymbaError where that cannot be."""

    def __enter__[T](self: T) -> T:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except HymbaError:
            if error is None:
                raise
