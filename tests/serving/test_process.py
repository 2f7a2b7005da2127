"""`hymba serve` as a process: its address, its messages, and how it ends."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
from entry.command import HYMBA, environment
from inference.models import make_model
from serving.served import model

from hymba_jax import cli
from hymba_jax.checkpoint.save import save_model
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.serving.batch import BatchConfig
from hymba_jax.serving.command import ServeConfig


@contextmanager
def process(tmp_path, *options):
    """A server, when it is ready, and its address."""
    save_model(tmp_path / "model", make_model(), model().tokenizer)
    command = [HYMBA, "serve", "--model", tmp_path / "model", "--port", "0", "--context", "512"]
    with subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env=environment(tmp_path / "cache")
    ) as server:
        try:
            lines = [server.stderr.readline(), server.stderr.readline()]
            assert re.fullmatch(r"model at http://127\.0\.0\.1:\d+: compiling\n", lines[0]), lines
            assert lines[1] == lines[0].replace("compiling", "ready")
            yield server, lines[0].split()[2].removesuffix(":")
        finally:
            server.kill()


@pytest.mark.slow
def test_sigterm_completes_the_streams_that_run(tmp_path):
    with (
        process(tmp_path, "--slots", "2") as (server, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert httpx.get(f"{url}/ready").status_code == 200
        options = {"model": "model", "max_tokens": 300, "temperature": 0, "stream": True}
        options["logit_bias"] = {str(model().tokenizer.encode("B")[0]): 100}
        streams = [client.completions.create(prompt=prompt, **options) for prompt in "abcdefgh"]
        answers = [next(stream).choices[0].text for stream in streams[:2]] + [""] * 6
        server.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # uvicorn looks for signals ten times a second
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        for i, stream in enumerate(streams):
            answers[i] += "".join(chunk.choices[0].text for chunk in stream)
        assert answers == ["B" * 300] * 8
        assert server.wait(30) == 143
        assert server.stderr.read() == "model: stopped; 8 completions were complete\n"


@pytest.mark.slow
def test_streams_that_take_longer_than_the_grace_are_cancelled(tmp_path):
    """One of 64,000 tokens, of which no machine samples all in a second."""
    with process(tmp_path, "--slots", "1", "--grace", "1") as (server, url):
        body = {"model": "model", "prompt": "a", "max_tokens": 500, "n": 128, "stream": True}
        body["logit_bias"] = {str(model().tokenizer.encode("B")[0]): 100}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            stream = response.iter_lines()
            next(stream)
            server.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            lines = [line for line in stream if line]
            assert time.monotonic() - begun > 0.9
        assert '"text": "B' in lines[-2]  # what it has sampled meanwhile
        assert "the server is shutting down" in json.loads(lines[-1][6:])["error"]["message"]
        assert server.wait(30) == 143
        completed = sum('"finish_reason": "length"' in line for line in lines)
        assert completed < 128
        assert server.stderr.read() == f"model: stopped; {completed} completions were complete\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefill-chunk", "100"], "prefill_chunk is 100, not a power of two from 32"),
        (["--slots", "3"], "slots is 3, not a power of two"),
        (["--decode-steps", "17"], "decode_steps is 17, not 1 to 16"),
        (["--queue", "0"], "queue is 0, not above 0"),
        (["--prefix-cache", "-1"], "prefix_cache is -1, not at least 0"),
        (["--grace", "0"], "grace is 0, not above 0"),
        (["--api-key", ""], "api_key is not a word of ASCII characters, which no"),
        (["--api-key", "clé"], "api_key is not a word of ASCII characters, which no"),
        (["--adapter", "one"], "adapter is 'one', not NAME=DIRECTORY"),
        (["--adapter", "gone=a"], "adapter: two models have the same name"),
        (["--port", "65536"], "port is 65536, not 0 to 65535"),
        (["--host", "203.0.113.1"], "203.0.113.1, port 8000: Cannot assign requested address: na"),
        (["--port", "0"], "gone: no model found"),
    ],
)
def test_what_cannot_be_served(monkeypatch, options, message):
    monkeypatch.setattr("hymba_jax.inference.warmup.use_compilation_cache", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", "--model", "gone", *options])
    assert str(stopped.value).startswith(f"error: {message}")
    assert "\n" not in str(stopped.value)


def test_adapters_by_name(monkeypatch):
    """Each is merged into a copy of the model."""
    loaded = []

    def load(choice, *, max_chunk):
        loaded.append((choice.model, choice.adapter, max_chunk))
        return model()

    monkeypatch.setattr(ModelChoice, "load", load)
    choice = ModelChoice("runs/base")
    config = ServeConfig(choice, adapter=("a=x", "b=y=z"), prefill_chunk=64, prefix_cache=0)
    assert [*config.load()] == ["base", "a", "b"]
    assert loaded == [("runs/base", adapter, 64) for adapter in ("", "x", "y=z")]


@pytest.mark.parametrize("path", [".", "../base", "runs/..", "runs/base/", "~"])
def test_a_model_has_the_name_of_its_directory(monkeypatch, tmp_path, path):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path / "base")
    monkeypatch.setenv("HOME", str(tmp_path / "base"))
    choice = ModelChoice(path)
    assert ServeConfig(choice).model_name == "base"
    assert BatchConfig(choice, input="in", output="out").model_name == "base"


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr("hymba_jax.inference.warmup.use_compilation_cache", lambda: None)
    monkeypatch.delitem(sys.modules, "hymba_jax.serving.command", raising=False)
    monkeypatch.delattr("hymba_jax.serving.command", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match="uvicorn is not installed: pip install"):
        cli.main(["serve", "--model", "gone"])
