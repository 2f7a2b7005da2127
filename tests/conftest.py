"""Strict everywhere: shapes checked at run time, no silent promotion of ranks."""

import gc
import os
import signal

# Before JAX starts: 8 CPU devices, so that sharding is tested on every machine.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest
from jaxtyping import install_import_hook

# The packages whose signatures have shapes; a check costs more than most functions of the others.
CHECKED = ("data", "inference", "model", "ops", "training")
install_import_hook([f"hymba_jax.{name}" for name in CHECKED], "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
# On a CPU a test is mostly XLA's compiling, so it need not make machine code that is fast.
QUICK_COMPILER = jax.default_backend() == "cpu"
jax.config.update("jax_disable_most_optimizations", QUICK_COMPILER)

# JAX holds millions of objects that live as long as a worker: do not search them all the time.
gc.set_threshold(100_000, 20, 20)

# A shell's background jobs ignore interrupts, and so would the programs that these tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def optimised():
    """Programs compiled as they are for people."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", QUICK_COMPILER)
