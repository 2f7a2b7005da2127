"""`hymba warmup`: nothing is left to compile for what comes after it."""

import functools
from pathlib import Path

import jax
import pytest
from inference.models import byte_tokenizer, compilations, make_model

from hymba_jax import cli
from hymba_jax.inference import LanguageModel, chat, warmup
from hymba_jax.inference.engine import Engine
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.inference.prompt_lookup import PromptLookup
from hymba_jax.inference.warmup import WarmupConfig, prompt_lengths, use_compilation_cache, warm


@pytest.fixture(scope="module")
def hymba():
    return make_model(layers="W")


def prefill_programs(engine, length):
    """Width of each chunk of a prompt, and whether it is the first."""
    chunks = engine.chunks([[0] * length])
    return {(chunk.tokens.shape[1], i == 0) for i, chunk in enumerate(chunks)}


@pytest.mark.parametrize("max_chunk", [32, 128])
@pytest.mark.parametrize("context", [2, 3, 32, 33, 34, 64, 65, 66, 128, 129, 130, 161, 200, 300])
def test_all_prefill_programs_are_compiled(hymba, context, max_chunk):
    engine = Engine(hymba, context=context, max_chunk=max_chunk)
    lengths = [*prompt_lengths(engine)]
    assert all(1 <= length < context for length in lengths)
    warmed = set().union(*(prefill_programs(engine, length) for length in lengths))
    needed = set().union(*(prefill_programs(engine, n) for n in range(1, context)))
    assert warmed == needed


def test_a_warm_model_compiles_nothing(hymba):
    model = LanguageModel(hymba, byte_tokenizer(), context=70)
    model.engine.max_chunk = 32
    for length in prompt_lengths(model.engine):
        warm(model, 2, length)
    with compilations() as names:
        for length in (1, 31, 33, 69):
            prompts = [[5] * length, [6] * (length // 2)]
            model.generate(prompts, max_new_tokens=40, temperature=0.7, top_k=5, seed=3)
    assert names == []


def test_a_warm_model_that_speculates_compiles_nothing(hymba, monkeypatch):
    model = LanguageModel(hymba, byte_tokenizer(), context=70, max_chunk=32, speculate=True)
    for length in prompt_lengths(model.engine):
        warm(model, 1, length)
    verified, verify = [], model.engine.verify
    monkeypatch.setattr(model.engine, "verify", lambda *a: verified.append(a) or verify(*a))
    monkeypatch.setattr(PromptLookup, "draft", lambda self, limit: [5] * min(limit, 3))
    with compilations() as names:
        model.generate([[5] * 20], max_new_tokens=40)
    assert verified
    assert names == []


def test_a_conversation_after_warm_up_compiles_nothing(hymba, monkeypatch):
    @functools.cache
    def load(choice, **options):
        return LanguageModel(hymba, byte_tokenizer(), context=choice.context, **options)

    monkeypatch.setattr(ModelChoice, "load", load)
    choice = ModelChoice("runs/it", context=200)
    warmup.main(WarmupConfig(choice, chat=True))
    model = chat.load(choice, speculate=False)
    with compilations() as names:
        for length in (20, 70, 150, 190):
            model.generate([[5] * length], max_new_tokens=9, temperature=0.7)
    assert names == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a context"),
        (["--context", "32", "--prompts", "0"], "prompts is 0, not 1 to the batch_size 8"),
        (["--context", "32", "--prompts", "9"], "prompts is 9, not 1 to the batch_size 8"),
        (["--context", "32"], "gone: no model found"),
    ],
)
def test_what_cannot_be_warmed(monkeypatch, arguments, message):
    monkeypatch.setattr("hymba_jax.inference.warmup.use_compilation_cache", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["warmup", "--model", "gone", *arguments])
    assert str(stopped.value).startswith(f"error: {message}")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("home", ["XDG_CACHE_HOME", "HOME"])
def test_where_compiled_programs_are_kept(monkeypatch, tmp_path, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(home, str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", "told")
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "told"
        jax.config.update("jax_compilation_cache_dir", None)
        use_compilation_cache()
        folder = tmp_path if home == "XDG_CACHE_HOME" else tmp_path / ".cache"
        assert Path(jax.config.jax_compilation_cache_dir) == folder / "hymba_jax"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
