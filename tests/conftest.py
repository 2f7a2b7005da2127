"""Strict everywhere: shapes checked at run time, no silent promotion of ranks."""

import gc
import os
import secrets
import signal
import sys
import tempfile

# Before JAX starts: 8 CPU devices, so that sharding is tested on every machine.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import fsspec
import jax
import pytest
from fsspec.registry import _registry
from jaxtyping import install_import_hook
from storage_emulators import emulators

# The packages whose signatures have shapes; a check costs more than most functions of the others.
CHECKED = ("analysis", "data", "evaluation", "inference", "model", "ops", "training")
install_import_hook([f"hymba_jax.{name}" for name in CHECKED], "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
# On a CPU a test is mostly XLA's compiling, so it need not make machine code that is fast.
QUICK_COMPILER = jax.default_backend() == "cpu"
jax.config.update("jax_disable_most_optimizations", QUICK_COMPILER)
# Many tests make programs anew that others of the same worker have compiled already.
COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# JAX holds millions of objects that live as long as a worker: do not search them all the time.
gc.set_threshold(100_000, 20, 20)

# A shell's background jobs ignore interrupts, and so would the programs that these tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    gc.freeze()  # nor what is there before the first test, which cost a tenth of the time


@pytest.fixture(scope="session")
def store_variables():
    """Environment variables of the storage emulators."""
    with emulators() as variables:
        yield variables


@pytest.fixture(params=["gs", "s3"])
def bucket_url(request, store_variables, monkeypatch):
    """The URL of a directory in an emulated bucket, in which nothing is yet."""
    for name, value in store_variables.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class(request.param).clear_instance_cache()
    return f"{request.param}://bucket/{secrets.token_hex(4)}"


@pytest.fixture(params=[("gcsfs", "gs", "gcs"), ("s3fs", "s3", "s3")], ids=["gs", "s3"])
def missing_package(request, monkeypatch):
    """The scheme of a package that is not installed, and the extra that installs it."""
    module, scheme, extra = request.param
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(_registry, scheme, raising=False)
    return scheme, extra


@pytest.fixture
def optimised():
    """Programs compiled as they are for people."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", QUICK_COMPILER)
