"""`hymba bench-serve`: how fast a server answers many clients, as they see it.

| measure | what it is                                                                |
|---------|---------------------------------------------------------------------------|
| TTFT    | from the request to its first text                                        |
| ITL     | between two deltas of an answer                                           |
| TPOT    | time after the first text over the tokens after the first, of each answer |
|         | of at least two deltas                                                    |
| latency | from the request to its end                                               |

With a rate, a request begins when it is due, also if all clients are busy then: an overloaded
server shows in TTFT and latency. Without, it begins when a client is free.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from hymba_jax.errors import HymbaError
from hymba_jax.files import check_output_file, parse_json, read_text, replace_text, resolve_path

WORDS = ("time", "people", "way", "water", "words", "day", "part", "number", "sound", "place")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class BenchConfig:
    """Measures a server of the OpenAI API with streamed completions.

    Attributes:
      url: of the API, such as http://127.0.0.1:8000/v1.
      model: its name there; the first that the server lists if absent.
      api_key: $HYMBA_API_KEY if absent.
      requests: how many are sent, unless a trace says.
      rate: requests a second that come at random moments (a Poisson process); 0 is all at once.
      clients: requests that are under way at the same time, at most; with a rate, others wait for
        them, which counts as time of the server.
      prompt_words: fewest and most words of a prompt; every number between is as likely.
      max_tokens: fewest and most tokens of an answer.
      trace: file of JSON lines, each a request's "prompt" and "max_tokens".
      seed: of lengths, words and moments.
      output: file for all numbers, in JSON.

    Raises:
      HymbaError: a value is impossible.
    """

    url: str
    model: str = ""
    api_key: str = ""
    requests: int = 100
    rate: float = 0.0
    clients: int = 64
    prompt_words: tuple[int, int] = (16, 64)
    max_tokens: tuple[int, int] = (32, 128)
    trace: str = ""
    seed: int = 0
    output: str = ""

    def __post_init__(self) -> None:
        if self.requests < 1 or self.clients < 1 or not 0 <= self.rate < float("inf"):
            raise HymbaError("requests and clients are at least 1, and rate at least 0")
        for name in ("prompt_words", "max_tokens"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise HymbaError(f"{name} is {least} {most}, not from 1 up")


@dataclass
class Measured:
    """One answer, by the client's clock.

    Attributes:
      sent: seconds when its request began.
      times: when each of its deltas with text came.
      ended: when it was complete.
      prompt_tokens, completion_tokens: as the server counts them; 0 if it does not say.
      error: why there is none; empty if there is.
    """

    sent: float
    times: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


def main(config: BenchConfig) -> None:
    """Prints a table of percentiles.

    Raises:
      HymbaError: the server cannot be reached, no request was answered, or the output cannot be
        written.
    """
    output = resolve_path(config.output) if config.output else None
    if output:
        check_output_file(output, [resolve_path(config.trace)] if config.trace else [])
    report = summarize(asyncio.run(measure(config)))
    console = Console(highlight=False, emoji=False)
    console.print(
        f"{report['completed']} of {report['requests']} requests in {report['seconds']:.1f} s: "
        f"{report['requests_per_second']:.2f} requests/s, "
        f"{report['completion_tokens_per_second']:.1f} tokens/s generated, "
        f"{report['prompt_tokens_per_second']:.1f} tokens/s of prompts",
        soft_wrap=True,
    )
    if count := report["without_usage"]:
        console.print(
            f"{count} x no usage: those answers' tokens are not counted, and they are not in TPOT"
        )
    for error, count in report["errors"].items():
        console.print(f"{count} x {error}", markup=False)
    table = Table("ms", "mean", *(f"p{p}" for p in PERCENTILES), "max")
    for name, values in report["ms"].items():
        table.add_row(name, *(f"{value:.1f}" for value in values.values()))
    console.print(table)
    if output:
        replace_text(output, json.dumps(report, indent=1) + "\n")


async def measure(config: BenchConfig) -> list[Measured]:
    """The answers to all requests.

    Raises:
      HymbaError: the server cannot be reached, or a trace is none.
    """
    bodies, rng = make_bodies(config), random.Random(config.seed)
    url = config.url.rstrip("/")
    key = config.api_key or os.environ.get("HYMBA_API_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=config.clients)
    async with httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as client:
        model = config.model or await _first_model(client, url)
        free = asyncio.Semaphore(config.clients)

        async def ask(body: dict[str, Any], due: float) -> Measured:
            async with free:
                sent = due if config.rate else time.perf_counter()
                return await _ask(client, url, {"model": model, **body}, sent)

        tasks = []
        for body in bodies:
            tasks.append(asyncio.create_task(ask(body, time.perf_counter())))
            if config.rate:
                await asyncio.sleep(rng.expovariate(config.rate))
        return list(await asyncio.gather(*tasks))


def make_bodies(config: BenchConfig) -> list[dict[str, Any]]:
    """The requests, but for the model's name.

    Raises:
      HymbaError: the trace has a line that is no request, or no line.
    """
    if config.trace:
        lines = enumerate(read_text(resolve_path(config.trace)).split("\n"), 1)
        bodies = [_traced(config.trace, i, line) for i, line in lines if line.strip()]
        if not bodies:
            raise HymbaError(f"{config.trace}: there are no requests in it")
        return bodies
    rng = random.Random(config.seed)
    return [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(*config.prompt_words))),
            "max_tokens": rng.randint(*config.max_tokens),
        }
        for _ in range(config.requests)
    ]


def summarize(answers: Sequence[Measured]) -> dict[str, Any]:
    """Rates and percentiles.

    Raises:
      HymbaError: none was answered.
    """
    done = [answer for answer in answers if not answer.error]
    errors = [answer.error for answer in answers if answer.error]
    if not done:
        raise HymbaError(f"no request was answered: {errors[0]}")
    seconds = max(answer.ended for answer in done) - min(answer.sent for answer in answers)
    spoken = [answer for answer in done if answer.times]
    measures = {
        "TTFT": [answer.times[0] - answer.sent for answer in spoken],
        "ITL": [gap for answer in spoken for gap in np.diff(answer.times).tolist()],
        "TPOT": [
            (answer.times[-1] - answer.times[0]) / (answer.completion_tokens - 1)
            for answer in spoken
            if answer.completion_tokens > 1 and len(answer.times) > 1
        ],
        "latency": [answer.ended - answer.sent for answer in done],
    }
    return {
        "requests": len(answers),
        "completed": len(done),
        "without_usage": sum(not answer.completion_tokens for answer in spoken),
        "errors": {error: errors.count(error) for error in sorted({*errors})},
        "seconds": seconds,
        "requests_per_second": len(done) / seconds,
        "prompt_tokens_per_second": sum(answer.prompt_tokens for answer in done) / seconds,
        "completion_tokens_per_second": sum(answer.completion_tokens for answer in done) / seconds,
        "ms": {name: _percentiles(values) for name, values in measures.items() if values},
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    values = 1e3 * np.array(seconds)
    named = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {"mean": float(values.mean()), **named, "max": float(values.max())}


def _traced(place: str, number: int, line: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
        return {"prompt": record["prompt"], "max_tokens": record["max_tokens"]}
    except (ValueError, KeyError, TypeError) as error:
        raise HymbaError(
            f'{place}, line {number}: not an object with "prompt" and "max_tokens"'
        ) from error


async def _first_model(client: httpx.AsyncClient, url: str) -> str:
    try:
        response = await client.get(f"{url}/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        advice = {401: "give the server's api_key", 404: "the URL has to end in /v1"}
        raise HymbaError(
            f"{url}/models: no model: status {status}: {advice.get(status, 'see its log')}"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
        raise HymbaError(f"{url}/models: no model: {error}") from error


async def _ask(client: httpx.AsyncClient, url: str, body: dict[str, Any], sent: float) -> Measured:
    """Sends a request, which began at `sent`, and measures its answer."""
    answer = Measured(sent)
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", f"{url}/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                answer.error = f"status {response.status_code}: {response.text[:200]}"
                return answer
            async for data in _events(response):
                _add_event(answer, data)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        answer.error = str(error) or type(error).__name__
    answer.ended = time.perf_counter()
    return answer


def _add_event(answer: Measured, data: str) -> None:
    """Adds what an event says to its answer; that it is none of OpenAI's, as an error."""
    try:
        event = json.loads(data)
        if error := event.get("error"):
            answer.error = str(error.get("message", error))
        if usage := event.get("usage"):
            answer.prompt_tokens = int(usage["prompt_tokens"])
            answer.completion_tokens = int(usage["completion_tokens"])
        if any(choice.get("text") for choice in event.get("choices") or ()):
            answer.times.append(time.perf_counter())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        answer.error = f"an event is not as OpenAI's API has it: {error!r}"


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each event but the last."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield data
