"""`hymba serve`: a model behind the OpenAI API, until it is told to stop."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from types import FrameType
from typing import Annotated

import tyro
import uvicorn

from hymba_jax.errors import HymbaError
from hymba_jax.inference.engine import MIN_CHUNK, bucket
from hymba_jax.inference.hidden_fields import without
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.serving.app import Api
from hymba_jax.serving.model_thread import ModelThread
from hymba_jax.serving.scheduler import Scheduler, check_batch
from hymba_jax.serving.served_model import ApiOptions

TERMINATED = 128 + int(signal.SIGTERM)
API_KEY = "HYMBA_API_KEY"
READING = 10  # seconds that clients have to read what was sent to them when the server stops


@dataclass(frozen=True)
class ServeConfig:
    """Serves a model over HTTP: /v1/completions, /v1/chat/completions and /v1/models.

    /health says whether it runs, /ready whether all programs are compiled; /metrics is for
    Prometheus. At SIGTERM or Ctrl-C it accepts no more requests and completes those it has.

    Attributes:
      host: address to listen at; the default can be reached from this machine only.
      port: 0 is any free one.
      name: of the model in the API; that of its directory if absent.
      adapter: PEFT adapters, each as NAME=DIRECTORY: requests for the model NAME are answered with
        the adapter merged into a copy of the model, with slots, queue and prefix cache of its own.
      api_key: one of which a request must have, as must $HYMBA_API_KEY; none are needed if there
        are none.
      slots: sequences that are decoded at the same time, a power of two.
      queue: requests that may wait for a slot; more are refused with status 429.
      prefill_chunk: tokens of prompts that are prefilled between two tokens of an answer, a power
        of two: fewer make answers steadier, more make prompts faster.
      decode_steps: tokens of each answer that are decoded at once, 1 to 16, while no prompt is
        prefilled: more serve more tokens a second, in larger deltas, and a new request waits for
        so many steps at most.
      prefix_cache: bytes of memory for states after beginnings of prompts, so that conversations
        and shared system messages are not prefilled again; 0 is none.
      max_body: bytes of a request.
      max_tokens: that a request may ask for; as many as fit the context if absent.
      timeout: seconds that a request may take.
      grace: seconds, a whole number, that running requests have to complete when the server stops.

    Raises:
      HymbaError: a value is impossible.
    """

    choice: Annotated[
        ModelChoice,
        tyro.conf.arg(name="", constructor=without(ModelChoice, "batch_size", "adapter")),
    ]
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    adapter: tuple[str, ...] = ()
    api_key: tuple[str, ...] = ()
    slots: int = 8
    queue: int = 256
    prefill_chunk: int = 256
    decode_steps: int = 4
    prefix_cache: int = 2**28
    max_body: int = 4_000_000
    max_tokens: int | None = None
    timeout: float = 600.0
    grace: int = 30

    def __post_init__(self) -> None:
        check_batch(self.slots, self.decode_steps)
        if self.prefill_chunk != bucket(self.prefill_chunk, MIN_CHUNK):
            raise HymbaError(
                f"prefill_chunk is {self.prefill_chunk}, not a power of two from {MIN_CHUNK}"
            )
        for adapter in self.adapter:
            if not all(adapter.partition("=")):
                raise HymbaError(f"adapter is {adapter!r}, not NAME=DIRECTORY")
        names = [adapter.partition("=")[0] for adapter in self.adapter]
        if len({*names, self.model_name}) <= len(names):
            raise HymbaError("adapter: two models have the same name")
        for key in self.api_key:
            _check_key("api_key", key)
        for name in ("queue", "max_body", "max_tokens", "timeout", "grace"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise HymbaError(f"{name} is {value}, not above 0")
        if self.prefix_cache < 0:
            raise HymbaError(f"prefix_cache is {self.prefix_cache}, not at least 0")
        if not 0 <= self.port < 2**16:
            raise HymbaError(f"port is {self.port}, not 0 to {2**16 - 1}")

    @property
    def model_name(self) -> str:
        """Of the model without an adapter, in the API."""
        return self.name or self.choice.name

    def load(self) -> dict[str, ModelThread]:
        """The thread of each model. Raises HymbaError if one cannot be loaded, or does not fit."""
        choices = {self.model_name: self.choice}
        for adapter in self.adapter:
            name, _, directory = adapter.partition("=")
            choices[name] = replace(self.choice, adapter=directory)
        threads: dict[str, ModelThread] = {}
        for name, each in choices.items():
            scheduler = Scheduler(
                each.load(max_chunk=self.prefill_chunk),
                self.slots,
                self.queue,
                self.decode_steps,
                self.prefix_cache,
                other_models=sum(thread.scheduler.num_bytes for thread in threads.values()),
            )
            threads[name] = ModelThread(scheduler)
            for line in scheduler.notes:
                _note(f"{name}: {line}")
        return threads


def main(config: ServeConfig) -> None:
    """Serves until a signal comes. Exits with 143 after SIGTERM.

    Raises:
      HymbaError: there is no such model, it does not fit into the device's memory, the address
        cannot be listened at, or the model has failed.
    """
    with _listen(config.host, config.port) as listener:  # first: loading takes time
        _serve(config, listener)


def _serve(config: ServeConfig, listener: socket.socket) -> None:
    """Loads the models and serves them at a bound socket."""
    keys = config.api_key
    if key := os.environ.get(API_KEY):
        _check_key(f"${API_KEY}", key)
        keys += (key,)
    options = ApiOptions(keys, config.max_body, config.max_tokens, config.timeout)
    threads = config.load()
    name = ", ".join(threads)
    server = _Server(
        uvicorn.Config(
            Api(threads, options).app(),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=config.grace + READING,
        ),
        config.grace,
        threads.values(),
    )
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def stop() -> None:
        server.should_exit = True

    def note_ready() -> None:
        if all(thread.is_ready for thread in threads.values()):
            _note(f"{name} at {address}: ready")

    _note(f"{name} at {address}: compiling")
    for thread in threads.values():
        thread.start(on_ready=note_ready, on_end=stop)
    signal.signal(signal.SIGTERM, _exit)  # which uvicorn raises again when it has stopped
    try:
        server.run(sockets=[listener])
    finally:
        for thread in threads.values():
            thread.stop()
        completed = sum(thread.scheduler.num_completed for thread in threads.values())
        _note(f"{name}: stopped; {completed} completions were complete")
    for model, thread in threads.items():
        if thread.error is not None:
            raise HymbaError(f"{model} has failed: {thread.error}")


class _Server(uvicorn.Server):
    """A server whose requests are told of its end when they have had their time to complete.

    Args:
      grace: seconds of it.
      threads: of the models.
    """

    def __init__(
        self, config: uvicorn.Config, grace: int, threads: Collection[ModelThread]
    ) -> None:
        super().__init__(config)
        self._grace, self._threads = grace, threads

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._grace, self._end_requests)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _end_requests(self) -> None:
        for thread in self._threads:
            thread.end()


def _check_key(name: str, key: str) -> None:
    """Raises HymbaError for a key that no request can have in its header."""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise HymbaError(f"{name} is not a word of ASCII characters, which no request could send")


def _listen(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not accept before the server does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise HymbaError(f"{host}, port {port}: {reason}: name another port or host") from error
    return listener


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
