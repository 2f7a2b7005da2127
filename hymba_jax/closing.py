"""Contexts whose end can fail."""

from abc import ABC, abstractmethod
from types import TracebackType

from hymba_jax.errors import HymbaError


class Closing(ABC):
    """A context manager whose `close` can fail.

    If the body raised an error, that one is kept, and one from `close` is dropped.
    """

    @abstractmethod
    def close(self) -> None:
        """Ends what is under way. Raises HymbaError if that fails."""

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
