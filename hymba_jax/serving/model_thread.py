"""The one thread that runs the model, and what a coroutine gets from it."""

import asyncio
import dataclasses
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from hymba_jax.errors import HymbaError
from hymba_jax.inference.completion_stream import Delta
from hymba_jax.serving.scheduler import GenerationRequest, Job, Output, Scheduler


def _nothing() -> None:
    """Nothing is to be done."""


class ModelFailed(HymbaError):
    """The model's thread has ended by an error of its own."""


class Outbox:
    """What the model's thread puts into queues of a loop, which it wakes once for many outputs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._outputs: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._is_woken = False

    def put(self, queue: asyncio.Queue[Any], output: Any) -> None:
        """Puts an output into a queue soon; from any thread."""
        self._outputs.append((queue, output))
        if not self._is_woken and not self.loop.is_closed():
            self._is_woken = True
            self.loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._is_woken = False  # first: what comes while this runs may wake the loop again
        while self._outputs:
            queue, output = self._outputs.popleft()
            queue.put_nowait(output)


class ModelThread:
    """Steps a scheduler in a thread of its own, as long as there is work.

    Attributes:
      is_ready: every program is compiled.
      error: what ended the thread.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.is_ready = False
        self.error: Exception | None = None
        self._on_ready = self._on_end = _nothing
        self._wake = threading.Event()
        self._stopping = False
        self._outbox: Outbox | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and self.error is None

    def start(
        self, *, on_ready: Callable[[], None] = _nothing, on_end: Callable[[], None] = _nothing
    ) -> None:
        """Starts the thread, which compiles first.

        Args:
          on_ready: is called by the thread when it has compiled.
          on_end: is called by the thread when it ends.
        """
        self._on_ready, self._on_end = on_ready, on_end
        self._thread.start()

    def end(self) -> None:
        """Ends the thread after its step, and every request that is left with an error."""
        self._stopping = True
        self._wake.set()

    def stop(self) -> None:
        """Ends the thread, and waits for it."""
        self.end()
        self._thread.join()

    def submit(self, request: GenerationRequest, deliver: Callable[[Output], None]) -> Job:
        """As `Scheduler.submit`. Raises ModelFailed, too, if the thread has ended."""
        if self.error or self._stopping:
            raise ModelFailed("the server is shutting down")
        job = self.scheduler.submit(request, deliver)
        if self._stopping:  # the thread may have failed what waited already
            job.fail(ModelFailed("the server is shutting down"))
        self._wake.set()
        return job

    def outbox(self) -> Outbox:
        """That of the running loop, which its generations share."""
        loop = asyncio.get_running_loop()
        if self._outbox is None or self._outbox.loop is not loop:
            self._outbox = Outbox(loop)
        return self._outbox

    def _run(self) -> None:
        try:
            self.scheduler.warmup(lambda: self._stopping)
            if not self._stopping:
                self.is_ready = True
                self._on_ready()
            while not self._stopping:
                if self.scheduler.has_work:
                    self.scheduler.step()
                else:  # cleared behind the wait: what was set before it must not be lost
                    self._wake.wait()
                    self._wake.clear()
            self.scheduler.deliver()
        except Exception as error:
            self.error = error
            if not isinstance(error, HymbaError):
                traceback.print_exc(file=sys.stderr)
        finally:
            self._stopping = True
            self.scheduler.fail(ModelFailed("the server is shutting down"))
            self._on_end()


class Generation:
    """The deltas of one or more requests, as the model's thread delivers them.

    Args:
      requests: which are all submitted, or none.

    Raises:
      HymbaError: one of them is refused.
    """

    def __init__(self, thread: ModelThread, requests: Sequence[GenerationRequest]) -> None:
        self._outbox = thread.outbox()
        self._queue: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._samples_left = sum(request.num_samples for request in requests)
        self._jobs: list[Job] = []
        try:
            for i, request in enumerate(requests):
                self._jobs.append(thread.submit(request, self._deliver_as(i)))
        except HymbaError:
            self.cancel()
            raise

    async def deltas(self) -> AsyncIterator[Delta]:
        """Each delta, with the index of its request.

        Raises:
          HymbaError: a request has ended with an error; the others are cancelled.
        """
        try:
            while self._samples_left:
                index, output = await self._queue.get()
                if isinstance(output, HymbaError):
                    raise output
                self._samples_left -= output.finish_reason is not None
                yield dataclasses.replace(output, index=index) if index else output
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Frees the slots that are still held."""
        for job in self._jobs:
            job.cancel()

    def _deliver_as(self, index: int) -> Callable[[Output], None]:
        def deliver(output: Output) -> None:
            self._outbox.put(self._queue, (index, output))

        return deliver
