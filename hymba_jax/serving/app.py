"""The HTTP side of a server: routes, limits, errors, and streams of events.

It runs in one asyncio loop. Text is tokenized and rendered in threads beside it, and the model's
own thread delivers what it samples (`model_thread.py`).
"""

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from hymba_jax.config.sampling import SamplingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.files import json_text
from hymba_jax.inference.completion_stream import Delta
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.inference.tool_calls import END
from hymba_jax.serving.answers import (
    AnswerFormat,
    ChatFormat,
    CompletionFormat,
    Json,
    head,
    merged,
    usage,
)
from hymba_jax.serving.messages import forced_beginning, template_messages, template_tools
from hymba_jax.serving.metrics import Metrics
from hymba_jax.serving.model_thread import Generation, ModelFailed, ModelThread
from hymba_jax.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    ToolChoice,
    logit_bias,
    parse,
    sampling_config,
)
from hymba_jax.serving.scheduler import DeadlineExceeded, GenerationRequest, QueueFull
from hymba_jax.tokenizer import chat_template

COMPLETION_TOKENS = 16  # of a completion that names no number, as OpenAI has it

type Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class ApiOptions:
    """What a server allows.

    Attributes:
      name: of the model.
      api_keys: one of which a request needs; none are needed if there are none.
      max_body: bytes of a request.
      max_tokens: that a request may ask for; as many as fit the context if absent.
      timeout: seconds that a request may take.
    """

    name: str
    api_keys: tuple[str, ...] = ()
    max_body: int = 4_000_000
    max_tokens: int | None = None
    timeout: float = 600.0


class Prepared(NamedTuple):
    """A request as it is submitted, and how its answer is written."""

    requests: list[GenerationRequest]
    answer: AnswerFormat

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)


class Api:
    """The endpoints of a model."""

    def __init__(self, model: LanguageModel, thread: ModelThread, options: ApiOptions) -> None:
        self._model, self._thread, self._options = model, thread, options
        self._metrics = Metrics(thread.scheduler, options.name)
        self._created = int(time.time())
        self._answer_end: tuple[tuple[str, ...], tuple[int, ...]] = ((), ())
        if model.tokenizer.chat_template is not None:
            self._answer_end = chat_template.answer_end(model.tokenizer)

    def app(self) -> Starlette:
        """The application, for an ASGI server."""
        guarded = self._guarded
        return Starlette(
            routes=[
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

    async def health(self, request: Request) -> Response:
        """Whether the model's thread is alive."""
        return Response(status_code=200 if self._thread.is_alive else 503)

    async def ready(self, request: Request) -> Response:
        """Whether all programs are compiled, so that requests are served at once."""
        is_ready = self._thread.is_alive and self._thread.is_ready
        return Response(status_code=200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The one model, in a list."""
        return JSONResponse({"object": "list", "data": [self._about_model()]})

    async def one_model(self, request: Request) -> Response:
        """The model of that name."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._about_model())

    async def completions(self, request: Request) -> Response:
        """Completions of prompts."""
        asked = parse(CompletionRequest, await self._body(request))
        return await self._answer(request, asked, self._prepare_completions)

    async def chat(self, request: Request) -> Response:
        """The next answer in a conversation."""
        asked = parse(ChatRequest, await self._body(request))
        return await self._answer(request, asked, self._prepare_chat)

    async def _answer[T: GenerationFields](
        self, request: Request, asked: T, prepare: Callable[[T], Prepared]
    ) -> Response:
        self._check_model(asked.model)
        if asked.stream_options and not asked.stream:
            raise ApiError(400, "stream_options needs stream", param="stream_options")
        try:
            prepared = await asyncio.to_thread(prepare, asked)
            generation = Generation(self._thread, prepared.requests)
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

    def _prepare_completions(self, asked: CompletionRequest) -> Prepared:
        if asked.echo and asked.logprobs is not None:
            raise ApiError(400, "log-probabilities of echoed prompts are not served", param="echo")
        given: Any = asked.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        allowed = self._options.max_tokens or COMPLETION_TOKENS
        max_tokens = self._max_tokens(asked.max_tokens or min(COMPLETION_TOKENS, allowed))
        prompts = self._model.encode(given, max_new_tokens=max_tokens)
        sampling = self._sampling(asked, max_tokens)
        alternatives = asked.logprobs or 0
        requests = [self._request(asked, prompt, sampling, alternatives) for prompt in prompts]
        echoes = [""] * len(prompts)
        if asked.echo:
            decode = self._model.tokenizer.decode
            echoes = [text if isinstance(text, str) else decode(text) for text in given]
        answer = CompletionFormat(
            self._model.tokenizer,
            echoes,
            asked.n or 1,
            log_probs=asked.logprobs is not None,
        )
        return Prepared(requests, answer)

    def _prepare_chat(self, asked: ChatRequest) -> Prepared:
        if asked.top_logprobs and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
        tools, forced = template_tools(asked), forced_beginning(asked)
        prompt = self._model.encode_chat(template_messages(asked.messages), tools=tools)
        if forced:
            prompt += self._model.tokenizer.encode(forced, parse_special=True)
        is_one_call = isinstance(asked.tool_choice, ToolChoice)
        room = self._model.engine.max_context - len(prompt)
        wanted = asked.max_completion_tokens or asked.max_tokens
        if wanted is None:
            if room < 1:
                raise ApiError(
                    400,
                    f"the conversation has {len(prompt)} tokens, which leaves no room for an "
                    f"answer in the context of {self._model.engine.max_context}",
                    param="messages",
                )
            wanted = min(room, self._options.max_tokens or room)
        stops, stop_tokens = self._answer_end
        sampling = self._sampling(
            asked,
            self._max_tokens(wanted),
            stop=stops + ((END,) if is_one_call else ()),
            stop_tokens=stop_tokens,
        )
        answer = ChatFormat(
            self._model.tokenizer,
            log_probs=bool(asked.logprobs),
            has_tools=tools is not None,
            forced=forced,
            closes_call=is_one_call,
        )
        return Prepared([self._request(asked, prompt, sampling, asked.top_logprobs or 0)], answer)

    def _max_tokens(self, wanted: int) -> int:
        limit = self._options.max_tokens
        if limit is not None and wanted > limit:
            raise ApiError(
                400, f"max_tokens is {wanted}: the server allows {limit}", param="max_tokens"
            )
        return wanted

    def _sampling(
        self,
        asked: GenerationFields,
        max_new_tokens: int,
        *,
        stop: tuple[str, ...] = (),
        stop_tokens: tuple[int, ...] = (),
    ) -> SamplingConfig:
        given = [name for name, value in asked if value is not None]
        defaults: Mapping[str, Any] = {"temperature": 1.0}  # as OpenAI has it
        if self._model.defaults.applies(given):
            defaults = self._model.defaults.sampling
        strings = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        return sampling_config(
            asked,
            defaults,
            max_new_tokens=max_new_tokens,
            seed=secrets.randbits(32) if asked.seed is None else asked.seed % 2**32,
            stop=strings + stop,
            stop_tokens=(*(asked.stop_token_ids or ()), *stop_tokens),
        )

    def _request(
        self,
        asked: GenerationFields,
        prompt: list[int],
        sampling: SamplingConfig,
        alternatives: int,
    ) -> GenerationRequest:
        return GenerationRequest(
            prompt,
            sampling,
            num_samples=asked.n or 1,
            logit_bias=logit_bias(asked),
            alternatives=alternatives,
            timeout=self._options.timeout,
        )

    async def _whole(self, prepared: Prepared, generation: Generation) -> Json:
        """An answer in one piece."""
        choices: dict[int, list[Delta]] = {}
        async with aclosing(self._observed(prepared, generation)) as deltas:
            async for delta in deltas:
                choices.setdefault(_choice(prepared, delta), []).append(delta)
        whole = {choice: merged(choices[choice]) for choice in sorted(choices)}
        return {
            **head(prepared.answer, self._options.name, is_chunk=False),
            "choices": [prepared.answer.whole(*item) for item in whole.items()],
            "usage": usage(
                prepared.prompt_tokens, sum(len(delta.tokens) for delta in whole.values())
            ),
        }

    async def _events(
        self, prepared: Prepared, generation: Generation, *, with_usage: bool
    ) -> AsyncIterator[str]:
        """An answer in chunks, as server-sent events."""
        answer = prepared.answer
        about = head(answer, self._options.name, is_chunk=True)
        about |= {"usage": None} if with_usage else {}
        opened, tokens = set[int](), 0
        try:
            async with aclosing(self._observed(prepared, generation)) as deltas:
                async for delta in deltas:
                    choice = _choice(prepared, delta)
                    opening = None if choice in opened else answer.opening(choice)
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
        return self._metrics.observe(generation.deltas(), prepared.prompt_tokens)

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

    def _check_model(self, name: str) -> None:
        if name != self._options.name:
            raise ApiError(
                404,
                f"there is no model {name!r}, only {self._options.name!r}",
                param="model",
                code="model_not_found",
            )

    def _about_model(self) -> Json:
        return {
            "id": self._options.name,
            "object": "model",
            "created": self._created,
            "owned_by": "hymba_jax",
            "max_model_len": self._model.engine.max_context,
        }


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
