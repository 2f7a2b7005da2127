"""`hymba batch`: requests from a file, answers to a file, in the format of OpenAI's Batch API.

The requests go to the endpoints of `hymba serve`, without a network between: the file is answered
as a server of the same model would answer it.
"""

import asyncio
import hashlib
import json
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from hymba_jax.checkpoint.checkpoints import loaded_step
from hymba_jax.errors import HymbaError
from hymba_jax.file_lock import locked
from hymba_jax.files import (
    check_output_file,
    json_text,
    open_regular,
    parse_json,
    read_json,
    read_text,
    replace_text,
    resolve_location,
    resolve_path,
)
from hymba_jax.inference.fingerprint import model_fingerprint
from hymba_jax.inference.hidden_fields import without
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.serving.app import Api
from hymba_jax.serving.model_thread import ModelThread
from hymba_jax.serving.scheduler import Scheduler, check_batch
from hymba_jax.serving.served_model import ApiOptions

CHUNK = 256  # tokens of prompts that are prefilled at once; the prefix cache keeps whole chunks
MAX_WAITING = 2**20  # prompts; a request may have many
LOG_EVERY = 30.0  # seconds between lines that say how far it is, where no bar does
URLS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class BatchConfig:
    """Answers the requests of a file, many at a time.

    A line of the input is {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions" or
    "/v1/completions", "body": {...}}; one of the output has its custom_id, and the response with
    its status. Answers come in the order in which they are complete. They are collected in
    OUTPUT.partial, with which the same command resumes where it was stopped; what they depend on is
    in OUTPUT.model, so that another model, and another request of the same custom_id, are refused.

    Attributes:
      input: file of JSON lines.
      output: file that is there when all requests are answered.
      name: of the model in the requests; that of its directory if absent.
      slots: sequences that are decoded at the same time, a power of two.
      prefix_cache: bytes of memory for states after beginnings of prompts, so that what prompts
        share is prefilled once; 0 is none.

    Raises:
      HymbaError: a number is impossible.
    """

    choice: Annotated[
        ModelChoice,
        tyro.conf.arg(name="", constructor=without(ModelChoice, "batch_size")),
    ]
    input: str
    output: str
    name: str = ""
    slots: int = 8
    prefix_cache: int = 2**28

    def __post_init__(self) -> None:
        check_batch(self.slots)
        if self.prefix_cache < 0:
            raise HymbaError(f"prefix_cache is {self.prefix_cache}, not a number of bytes")

    @property
    def model_name(self) -> str:
        """Of the model in the requests."""
        return self.name or self.choice.name


def main(config: BatchConfig) -> None:
    """Answers what is not answered yet, and says how many requests were refused.

    Raises:
      HymbaError: a file or the model cannot be read, a line is no request, or another process is
        answering to the same output; or there is an output, or all answers are errors.
    """
    output = resolve_path(config.output).resolve()
    check_output_file(output, [resolve_path(config.input)])
    if output.exists():
        raise HymbaError(f"{output}: exists already: name another output, or delete it")
    requests = read_requests(config.input)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    lock = output.with_name(f"{output.name}.lock")
    with locked(lock, "`hymba batch` of the same output", console.print):
        _answer_file(config, requests, output, console)


def _answer_file(
    config: BatchConfig, requests: list[dict[str, Any]], output: Path, console: Console
) -> None:
    """Answers requests to a file that no other process answers to."""
    partial, begun = (output.with_name(f"{output.name}.{end}") for end in ("partial", "model"))
    done = {custom_id for custom_id, _ in _answered(partial)}
    left = [request for request in requests if request["custom_id"] not in done]
    model = config.choice.load(max_chunk=CHUNK)
    scheduler = Scheduler(model, config.slots, MAX_WAITING, prefix_bytes=config.prefix_cache)
    for line in scheduler.notes:
        console.print(line)
    check_same(begun, config, model_fingerprint(model), requests, done)
    if done:
        console.print(f"{partial}: resumes with {len(left)} of {len(requests)} requests")
    if left:
        thread = ModelThread(scheduler)
        thread.start()
        try:
            asyncio.run(_answer_all({config.model_name: thread}, left, partial, console))
        except KeyboardInterrupt:
            console.print(f"stopped by Ctrl-C: the same command resumes with what {partial} has")
            raise
        finally:
            thread.stop()
        if thread.error is not None:
            raise HymbaError(f"the model has failed: {thread.error}")
    errors = Counter(error and error["message"] for _, error in _answered(partial))
    os.replace(partial, output)
    begun.unlink()
    count, refused = errors.total(), errors.total() - errors.pop(None, 0)
    reason = f", such as: {errors.most_common(1)[0][0]}" if errors else ""
    if count == refused:
        raise HymbaError(f"{output}: all {count} answers are errors{reason}")
    console.print(f"{output}: {count} answers, {refused} of them errors{reason}")


def read_requests(name: str) -> list[dict[str, Any]]:
    """The requests of a file. Raises HymbaError if a line is none, or has the id of another."""
    requests, ids = [], set[str]()
    for place, value in _lines(resolve_path(name)):
        if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
            raise HymbaError(f'{place}: not an object with a "custom_id"')
        if value.get("method") != "POST" or value.get("url") not in URLS:
            raise HymbaError(f'{place}: "method" is not POST, or "url" none of {", ".join(URLS)}')
        if not isinstance(value.get("body"), dict) or value["body"].get("stream"):
            raise HymbaError(f'{place}: no "body", or one with "stream"')
        if value["custom_id"] in ids:
            raise HymbaError(f"{place}: another line has the custom_id {value['custom_id']!r}")
        ids.add(value["custom_id"])
        requests.append(value)
    if not requests:
        raise HymbaError(f"{name}: there are no requests in it")
    return requests


def check_same(
    record: Path,
    config: BatchConfig,
    fingerprint: str,
    requests: Sequence[dict[str, Any]],
    done: AbstractSet[str],
) -> None:
    """Compares what the answers depend on with what it was, where there are some; and records it.

    Args:
      fingerprint: of the model: its directory may have been written anew.
      done: the ids of the requests that are answered.

    Raises:
      HymbaError: the answers are another model's, or other requests'.
    """
    chosen = _what_answers(config)
    digests = {request["custom_id"]: _digest(request) for request in requests}
    partial = record.with_suffix(".partial")
    if done:
        if not record.exists():
            raise HymbaError(
                f"{partial}: {record.name}, which says whose answers it has, is missing"
            )
        begun = read_json(record)
        if changed := [name for name in chosen if begun.get(name) != chosen[name]]:
            what = ", ".join(f"{name} {begun.get(name)}, not {chosen[name]}" for name in changed)
            raise HymbaError(f"{partial}: begun with {what}: give that, or delete the file")
        if begun.get("fingerprint") != fingerprint:
            raise HymbaError(
                f"{partial}: begun with another model than {chosen['model']} holds now: restore "
                "that, or delete the file"
            )
        if wrong := [key for key in done if begun["requests"].get(key) != digests.get(key)]:
            raise HymbaError(
                f"{partial}: the request {min(wrong)!r}, which it answers, is gone or another one: "
                "give the old one, or delete the file"
            )
    new = {**chosen, "fingerprint": fingerprint, "requests": digests}
    replace_text(record, json_text(new) + "\n")


def _what_answers(config: BatchConfig) -> dict[str, Any]:
    """What answers depend on: the model and its checkpoint, formats, and rows, by rounding."""
    choice = config.choice
    location = resolve_location(choice.model)
    names = ("dtype", "state_dtype", "weights", "kv_cache", "context")
    return {
        "model": str(location.resolve() if isinstance(location, Path) else location),
        "name": config.model_name,
        "slots": config.slots,
        "step": loaded_step(choice.model, choice.step),
        "adapter": str(resolve_path(choice.adapter).resolve()) if choice.adapter else "",
        **{name: getattr(choice, name) for name in names},
    }


def _digest(request: dict[str, Any]) -> str:
    """Of all that its answer depends on."""
    asked = [request["url"], request["body"]]
    return hashlib.blake2b(json_text(asked).encode(), digest_size=8).hexdigest()


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise HymbaError(f"{path}: no such file") from error
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {i}", parse_json(line)
            except ValueError as error:
                raise HymbaError(f"{path}, line {i}: broken JSON ({error})") from error


def _answered(path: Path) -> Iterator[tuple[str, Any]]:
    """Id and error of each answer in a file, if there is one; a last line cut off is removed.

    Raises:
      HymbaError: the file holds something else.
    """
    if not path.exists():
        return
    length = 0
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                os.truncate(path, length)
                return
            length += len(line)
            try:
                answer = parse_json(line)
                custom_id, error = answer["custom_id"], answer["error"]
            except (ValueError, KeyError, TypeError) as reason:
                raise HymbaError(
                    f"{path}, line {number}: not an answer of `hymba batch`: name another output, "
                    "or delete the file"
                ) from reason
            yield custom_id, error


async def _answer_all(
    threads: dict[str, ModelThread],
    requests: list[dict[str, Any]],
    partial: Path,
    console: Console,
) -> None:
    """Appends the answers to a file as they are complete."""
    app = Api(threads, ApiOptions(max_body=2**62, timeout=math.inf)).app()
    slots = sum(thread.scheduler.slots for thread in threads.values())
    waiting = iter(requests)  # shared by all clients
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with (
        partial.open("a", encoding="utf-8") as file,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("answering", total=len(requests))
        logged = time.monotonic()

        async def answer_some(client: httpx.AsyncClient) -> None:
            nonlocal logged
            for request in waiting:
                response = await client.post(request["url"], content=json_text(request["body"]))
                if not all(thread.is_alive for thread in threads.values()):
                    return  # that is no answer
                file.write(json_text(_answer(request["custom_id"], response)) + "\n")
                file.flush()
                progress.advance(task)
                if not console.is_terminal and time.monotonic() - logged >= LOG_EVERY:
                    logged = time.monotonic()
                    done = progress.tasks[task].completed
                    console.print(f"{done:.0f} of {len(requests)} requests are answered")

        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://batch", timeout=None
        ) as client:
            # As many again as there are slots are prepared meanwhile.
            await asyncio.gather(*(answer_some(client) for _ in range(2 * slots)))


def _answer(custom_id: str, response: httpx.Response) -> dict[str, Any]:
    body = json.loads(response.content)
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": custom_id,
        "response": {
            "status_code": response.status_code,
            "request_id": body.get("id", ""),
            "body": body,
        },
        "error": body.get("error"),
    }
