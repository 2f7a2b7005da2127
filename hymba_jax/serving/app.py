"""The HTTP side of a server: routes, limits, errors, and streams of events.

It runs in one asyncio loop. Requests are parsed, rendered and tokenized in threads beside it, and
the model's own thread delivers what it samples (`model_thread.py`).
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from hymba_jax.errors import HymbaError
from hymba_jax.files import json_text
from hymba_jax.inference.completion_stream import Delta
from hymba_jax.serving.answers import (
    Json,
    head,
    merged,
    usage,
)
from hymba_jax.serving.grammar import GrammarError
from hymba_jax.serving.metrics import Metrics
from hymba_jax.serving.model_thread import Generation, ModelFailed, ModelThread
from hymba_jax.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    parse,
)
from hymba_jax.serving.scheduler import DeadlineExceeded, QueueFull
from hymba_jax.serving.served_model import ApiOptions, Prepared, ServedModel

CHAT_PAGE = Path(__file__).with_name("chat_page.html")
# It loads nothing from elsewhere, and no other page may frame it.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
}

type Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """The endpoints of a server.

    Args:
      models: the thread of each model that requests may name.
    """

    def __init__(self, models: Mapping[str, ModelThread], options: ApiOptions) -> None:
        self._models = {name: ServedModel(name, thread, options) for name, thread in models.items()}
        self._options = options
        self._metrics = Metrics({name: thread.scheduler for name, thread in models.items()})

    def app(self) -> Starlette:
        """The application, for an ASGI server."""
        guarded = self._guarded
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.metrics),
                Route("/v1/models", guarded(self.models)),
                Route("/v1/models/{name:path}", guarded(self.one_model)),
                Route("/v1/completions", guarded(self.completions), methods=["POST"]),
                Route("/v1/chat/completions", guarded(self.chat), methods=["POST"]),
            ],
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_error,
                ClientDisconnect: _disconnected,
                Exception: _server_error,
            },
        )

    async def page(self, request: Request) -> Response:
        """A page to chat on, which asks for a key if one is needed."""
        return HTMLResponse(CHAT_PAGE.read_text("utf-8"), headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        """Whether the models' threads are alive."""
        is_alive = all(served.thread.is_alive for served in self._models.values())
        return Response(status_code=200 if is_alive else 503)

    async def ready(self, request: Request) -> Response:
        """Whether all programs are compiled, so that requests are served at once."""
        threads = [served.thread for served in self._models.values()]
        is_ready = all(thread.is_alive and thread.is_ready for thread in threads)
        return Response(status_code=200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """All models, in a list."""
        about = [served.about for served in self._models.values()]
        return JSONResponse({"object": "list", "data": about})

    async def one_model(self, request: Request) -> Response:
        """The model of that name."""
        return JSONResponse(self._served(request.path_params["name"]).about)

    async def completions(self, request: Request) -> Response:
        """Completions of prompts."""
        return await self._answer(request, CompletionRequest, ServedModel.prepare_completions)

    async def chat(self, request: Request) -> Response:
        """The next answer in a conversation."""
        return await self._answer(request, ChatRequest, ServedModel.prepare_chat)

    async def _answer[T: (ChatRequest, CompletionRequest)](
        self, request: Request, kind: type[T], prepare: Callable[[ServedModel, T], Prepared]
    ) -> Response:
        body = await self._body(request)
        try:
            asked, prepared = await asyncio.to_thread(self._prepared, body, kind, prepare)
            generation = Generation(prepared.served.thread, prepared.requests)
        except HymbaError as error:
            raise _refusal(error) from error
        if asked.stream:
            events = self._events(prepared, generation, with_usage=asked.includes_usage)
            return EventStream(events, generation)
        try:
            whole = self._whole(prepared, generation)
            return JSONResponse(await _unless_disconnected(request, whole))
        except HymbaError as error:
            raise _failure(error) from error
        finally:
            generation.cancel()

    def _prepared[T: (ChatRequest, CompletionRequest)](
        self, body: bytes, kind: type[T], prepare: Callable[[ServedModel, T], Prepared]
    ) -> tuple[T, Prepared]:
        """What is asked for. Raises HymbaError or ApiError if it is impossible."""
        asked = parse(kind, body)
        served = self._served(asked.model)
        if asked.stream_options and not asked.stream:
            raise ApiError(400, "stream_options needs stream", param="stream_options")
        return asked, prepare(served, asked)

    async def _whole(self, prepared: Prepared, generation: Generation) -> Json:
        """An answer in one piece."""
        choices: dict[int, list[Delta]] = {}
        async with aclosing(self._observed(prepared, generation)) as deltas:
            async for delta in deltas:
                choices.setdefault(_choice(prepared, delta), []).append(delta)
        whole = {choice: merged(choices[choice]) for choice in sorted(choices)}
        return {
            **head(prepared.answer, prepared.served.name, is_chunk=False),
            "choices": [await _formatted(prepared.answer.whole, *item) for item in whole.items()],
            "usage": usage(
                prepared.prompt_tokens, sum(len(delta.tokens) for delta in whole.values())
            ),
        }

    async def _events(
        self, prepared: Prepared, generation: Generation, *, with_usage: bool
    ) -> AsyncIterator[str]:
        """An answer in chunks, as server-sent events."""
        answer = prepared.answer
        about = head(answer, prepared.served.name, is_chunk=True)
        about |= {"usage": None} if with_usage else {}
        opened, tokens = set[int](), 0
        try:
            async with aclosing(self._observed(prepared, generation)) as deltas:
                async for delta in deltas:
                    choice = _choice(prepared, delta)
                    opening = None
                    if choice not in opened:
                        opening = await _formatted(answer.opening, choice, delta)
                    opened.add(choice)
                    tokens += len(delta.tokens)
                    for part in (opening, answer.chunk(choice, delta)):
                        if part is not None:
                            yield _event({**about, "choices": [part]})
        except HymbaError as error:
            yield _event(_failure(error).body)
            return
        if with_usage:
            yield _event({**about, "choices": [], "usage": usage(prepared.prompt_tokens, tokens)})
        yield "data: [DONE]\n\n"

    def _observed(self, prepared: Prepared, generation: Generation) -> Any:
        name = prepared.served.name
        return self._metrics.observe(name, generation.deltas(), prepared.prompt_tokens)

    async def _body(self, request: Request) -> bytes:
        """The body of a request. Raises ApiError if it is too large, or too slow."""
        body, limit = bytearray(), self._options.max_body
        try:
            async with asyncio.timeout(self._options.timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise ApiError(413, f"the body has more than {limit} bytes")
        except TimeoutError as error:
            raise ApiError(408, "the body did not come in time", "timeout_error") from error
        return bytes(body)

    def _guarded(self, handler: Handler) -> Handler:
        """The handler for those who have a key, if keys are needed."""
        keys = [key.encode() for key in self._options.api_keys]

        async def handle(request: Request) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            matches = [hmac.compare_digest(given, key) for key in keys]  # all: in the same time
            if keys and not any(matches):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            return await handler(request)

        return handle

    def _served(self, name: str) -> ServedModel:
        """The model of that name. Raises ApiError if there is none."""
        if name not in self._models:
            names = ", ".join(map(repr, self._models))
            raise ApiError(
                404,
                f"there is no model {name!r}, only {names}",
                param="model",
                code="model_not_found",
            )
        return self._models[name]


class JSONResponse(Response):
    """A response whose body is JSON."""

    media_type = "application/json"

    def render(self, content: Json) -> bytes:
        return json_text(content).encode()


class EventStream(StreamingResponse):
    """Server-sent events, whose generation is cancelled when the client leaves."""

    def __init__(self, events: AsyncIterator[str], generation: Generation) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


async def _unless_disconnected[T](request: Request, work: Any) -> T:
    """The result of a coroutine, which is cancelled if the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _choice(prepared: Prepared, delta: Delta) -> int:
    return delta.index * prepared.requests[0].num_samples + delta.sample


async def _formatted[T: Json | None](
    form: Callable[[int, Delta], T], choice: int, delta: Delta
) -> T:
    """What `form` makes of a delta; of a long prompt's scores while other streams are served."""
    if delta.prompt is None:
        return form(choice, delta)
    return await asyncio.to_thread(form, choice, delta)


def _event(value: Json) -> str:
    return f"data: {json_text(value)}\n\n"


def _refusal(error: HymbaError) -> ApiError:
    """What a client is told of a request that was not accepted."""
    match error:
        case QueueFull():
            return ApiError(429, str(error), "rate_limit_error", code="rate_limit_exceeded")
        case ModelFailed():
            return ApiError(503, str(error), "server_error")
        case _:
            return ApiError(400, str(error))


def _failure(error: HymbaError) -> ApiError:
    """What a client is told of a request that was not completed."""
    match error:
        case GrammarError():
            return ApiError(400, str(error))
        case DeadlineExceeded():
            return ApiError(504, str(error), "timeout_error")
        case ModelFailed():
            return ApiError(503, str(error), "server_error")
        case _:
            return ApiError(500, str(error), "server_error")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(known.body, error.status_code, headers=error.headers)


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _server_error(request: Request, error: Exception) -> Response:
    """The traceback is the server's, not the client's."""
    body = ApiError(500, "internal error", "server_error").body
    return JSONResponse(body, 500, {"connection": "close"})  # uvicorn closes it
