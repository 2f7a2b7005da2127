"""The model that the tests of serving share, and so its compiled programs; and a server of it."""

import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import uvicorn
from inference.models import byte_tokenizer, make_model

from hymba_jax.inference.completion_stream import Delta
from hymba_jax.inference.language_model import LanguageModel
from hymba_jax.serving.app import Api
from hymba_jax.serving.model_thread import ModelThread
from hymba_jax.serving.scheduler import GenerationRequest, Job, Output, Scheduler
from hymba_jax.serving.served_model import ApiOptions
from hymba_jax.tokenizer import Tokenizer

CONTEXT, CHUNK, SLOTS = 64, 16, 4
TEMPLATE = (
    "{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}"
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments.a }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@functools.cache
def model(scale: float = 1.0) -> LanguageModel:
    """Another one for each scale of its embedding."""
    tokenizer = Tokenizer(byte_tokenizer().model, "<s>", "</s>", TEMPLATE)
    hymba = make_model()
    hymba.embedding[...] *= scale
    return LanguageModel(hymba, tokenizer, context=CONTEXT, max_chunk=CHUNK)


class ScriptedThread(ModelThread):
    """Answers prompts with a word of `script` by what that says, and all others by the model.

    Attributes:
      script: answers; each comes in deltas of three characters.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self.script: dict[str, str] = {}
        self.asked: list[GenerationRequest] = []

    def submit(self, request: GenerationRequest, deliver: Callable[[Output], None]) -> Job:
        self.asked.append(request)
        text = self.scheduler.model.tokenizer.decode(list(request.prompt))
        for word, answer in self.script.items():
            if word in text:
                whole = answer
                ends = [i for stop in request.sampling.stop if (i := answer.find(stop)) >= 0]
                answer = answer[: min(ends, default=None)]
                for start in range(0, len(answer), 3):
                    part = answer[start : start + 3]
                    deliver(Delta(0, 0, part, [*part.encode()], [0.0] * len(part), None))
                stop = next((stop for stop in request.sampling.stop if stop in whole), None)
                deliver(Delta(0, 0, "", [], [], "stop", stop_string=stop))
                return Job(request, deliver)
        return super().submit(request, deliver)


@contextmanager
def serving(
    options: ApiOptions, others: Mapping[str, LanguageModel] | None = None
) -> Iterator[tuple[str, ScriptedThread]]:
    """The address of a server on this machine, and the thread of its model "tiny"."""
    thread = ScriptedThread(Scheduler(model(), slots=SLOTS))
    threads: dict[str, ModelThread] = {"tiny": thread}
    for name, other in (others or {}).items():
        threads[name] = ModelThread(Scheduler(other, slots=SLOTS))
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        Api(threads, options).app(),
        log_level="error",
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    runner = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    for each in threads.values():
        each.start()
    runner.start()
    try:
        wait_until(lambda: all(t.is_ready for t in threads.values()) and server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", thread
    finally:
        server.should_exit = True
        runner.join()
        for each in threads.values():
            each.stop()
    assert not any(each.error for each in threads.values())


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
