"""`hymba serve`: a model behind the OpenAI API, until it is told to stop."""

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType
from typing import Annotated

import tyro
import uvicorn

from hymba_jax.errors import HymbaError
from hymba_jax.inference.engine import MIN_CHUNK, bucket
from hymba_jax.inference.hidden_fields import without
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.serving.app import Api, ApiOptions
from hymba_jax.serving.model_thread import ModelThread
from hymba_jax.serving.scheduler import Scheduler

TERMINATED = 128 + int(signal.SIGTERM)
API_KEY = "HYMBA_API_KEY"


@dataclass(frozen=True)
class ServeConfig:
    """Serves a model over HTTP: /v1/completions, /v1/chat/completions and /v1/models.

    /health says whether it runs, /ready whether all programs are compiled; /metrics is for
    Prometheus. At SIGTERM or Ctrl-C it accepts no more requests and completes those it has.

    Attributes:
      host: address to listen at; the default can be reached from this machine only.
      port: 0 is any free one.
      name: of the model in the API; that of its directory if absent.
      api_key: one of which a request must have, as must $HYMBA_API_KEY; none are needed if there
        are none.
      slots: sequences that are decoded at the same time, a power of two.
      queue: requests that may wait for a slot; more are refused with status 429.
      prefill_chunk: tokens of prompts that are prefilled between two tokens of an answer, a power
        of two: fewer make answers steadier, more make prompts faster.
      prefix_cache: bytes of memory for states after beginnings of prompts, so that conversations
        and shared system messages are not prefilled anew; 0 is none.
      max_body: bytes of a request.
      max_tokens: that a request may ask for; as many as fit the context if absent.
      timeout: seconds that a request may take.
      grace: seconds that running requests have to complete when the server stops.

    Raises:
      HymbaError: a value is impossible.
    """

    choice: Annotated[
        ModelChoice,
        tyro.conf.arg(name="", constructor=without(ModelChoice, "batch_size")),
    ]
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    api_key: tuple[str, ...] = ()
    slots: int = 8
    queue: int = 256
    prefill_chunk: int = 256
    prefix_cache: int = 2**28
    max_body: int = 4_000_000
    max_tokens: int | None = None
    timeout: float = 600.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        if self.prefill_chunk != bucket(self.prefill_chunk, MIN_CHUNK):
            raise HymbaError(
                f"prefill_chunk is {self.prefill_chunk}, not a power of two from {MIN_CHUNK}"
            )
        if not all(self.api_key):
            raise HymbaError("api_key is empty")
        for name in ("queue", "max_body", "max_tokens", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise HymbaError(f"{name} is {value}, not above 0")
        if self.prefix_cache < 0:
            raise HymbaError(f"prefix_cache is {self.prefix_cache}, not at least 0")
        if not 0 <= self.port < 2**16:
            raise HymbaError(f"port is {self.port}, not 0 to {2**16 - 1}")


def main(config: ServeConfig) -> None:
    """Serves until a signal comes. Exits with 143 after SIGTERM.

    Raises:
      HymbaError: there is no such model, it does not fit into the device's memory, the address
        cannot be listened at, or the model has failed.
    """
    with _listen(config.host, config.port) as listener:  # first: loading takes time
        _serve(config, listener)


def _serve(config: ServeConfig, listener: socket.socket) -> None:
    """Loads the model and serves it at a bound socket."""
    name = config.name or PurePath(config.choice.model).name
    keys = (*config.api_key, *filter(None, [os.environ.get(API_KEY)]))
    options = ApiOptions(name, keys, config.max_body, config.max_tokens, config.timeout)
    model = config.choice.load(max_chunk=config.prefill_chunk)
    thread = ModelThread(
        Scheduler(model, config.slots, config.queue, prefix_bytes=config.prefix_cache)
    )
    server = uvicorn.Server(
        uvicorn.Config(
            Api(model, thread, options).app(),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=max(1, round(config.grace)),
        )
    )
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def stop() -> None:
        server.should_exit = True

    _note(f"{name} at {address}: compiling")
    thread.start(on_ready=lambda: _note(f"{name} at {address}: ready"), on_end=stop)
    signal.signal(signal.SIGTERM, _exit)  # which uvicorn raises again when it has stopped
    try:
        server.run(sockets=[listener])
    finally:
        thread.stop()
        _note(f"{name}: stopped; {thread.scheduler.num_completed} completions were complete")
    if thread.error is not None:
        raise HymbaError(f"the model has failed: {thread.error}")


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
