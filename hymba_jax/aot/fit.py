"""A program's memory per chip, and how to reduce it."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from hymba_jax.config.run import RunConfig
from hymba_jax.display import format_bytes
from hymba_jax.parallel.mesh import AnyMesh, batch_shards


class Memory(NamedTuple):
    """Bytes on each chip.

    Attributes:
      arguments: parameters, optimizer state and batch, or parameters and caches.
      temporaries: further memory of the step.
      total: both, with code and non-donated outputs.
    """

    arguments: int
    temporaries: int
    total: int


def compiled_memory(compiled: Any) -> Memory:
    """The compiler's account of a program."""
    account = compiled.memory_analysis()
    arguments, temporaries = account.argument_size_in_bytes, account.temp_size_in_bytes
    results = account.output_size_in_bytes - account.alias_size_in_bytes
    code = account.generated_code_size_in_bytes
    return Memory(arguments, temporaries, arguments + temporaries + results + code)


def refused_memory(error: Exception, arguments: int) -> Memory | None:
    """The memory of a program that did not fit; None if it failed for another reason.

    TPUs' compiler says what temporaries would take, or everything.
    """
    found = re.search(r"memory required for ([^(]*)\(([\d.]+)([KMG])\)", str(error))
    if found is None:
        return None
    size = round(float(found[2]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[3]])
    if "temporaries" in found[1] and "arguments" not in found[1]:
        return Memory(arguments, size, arguments + size)
    return Memory(arguments, size - arguments, size)


def training_advice(
    run: RunConfig, mesh: AnyMesh, table: str, memory: Memory, available: float
) -> Iterator[str]:
    """What to change so that a training step fits, the cheapest first.

    Args:
      table: of the config, that sets gradient_accumulation_steps.
    """
    training, room = run.training, available - memory.arguments
    unsharded = "training.reduction_shards 0: with it chips shard neither state nor sequences"
    if room <= 0:
        more = _shard_more(mesh, run.model.hidden_size, memory.arguments, available)
        yield unsharded if training.reduction_shards else more
        return
    if run.compute.remat != "block":
        yield "compute.remat block: stores only the input of each layer"
    option, steps = f"{table}.gradient_accumulation_steps", training.gradient_accumulation_steps
    rows = training.micro_batch_size // batch_shards(mesh)
    if training.reduction_shards:  # of which a chip computes one at a time
        option, steps = "training.reduction_shards", training.reduction_shards
        rows = training.batch_size // steps
    sequence = memory.temporaries / rows
    if rows > 1:
        fewer = max(d for d in range(1, rows) if rows % d == 0 and d <= max(1, room / sequence))
        steps *= rows // fewer
        yield (
            f"{option} {steps}: a chip then has {_sequences(fewer)} at a time, not {rows}, and "
            f"temporaries shrink from {format_bytes(memory.temporaries)} to about "
            f"{format_bytes(fewer * sequence)}"
        )
    if sequence > room:
        more = _shard_sequences(mesh, option, steps, memory.arguments, sequence, available)
        yield unsharded if training.reduction_shards else more


def _shard_sequences(
    mesh: AnyMesh, option: str, steps: int, arguments: int, sequence: float, available: float
) -> str:
    """How chips share a sequence of which one cannot hold the temporaries.

    On the same chips there are fewer shards of the state, which grow, and of the batch, so that
    more micro-batches are needed; other chips leave both as they are.

    Args:
      option, steps: of gradient accumulation, where a chip has one sequence at a time.
      sequence: bytes of temporaries.
    """
    room, shards, fsdp = available - arguments, mesh.shape["sequence"], mesh.shape["fsdp"]
    why = f"a sequence takes {format_bytes(sequence)} of temporaries, {format_bytes(room)} are left"
    for n in (2**power for power in range(1, fsdp.bit_length())):
        if fsdp % n == 0 and n * arguments + sequence / n <= available:
            return (
                f"parallel.sequence {n * shards}, parallel.fsdp {fsdp // n}, {option} {n * steps}: "
                f"{why}; chips then share the work on a sequence"
            )
    n = 2 ** math.ceil(math.log2(sequence / room))
    return (
        f"a topology of {n * mesh.size} chips with parallel.sequence {n * shards}: {why}; chips "
        "then share the work on a sequence"
    )


def _shard_more(mesh: AnyMesh, hidden: int, arguments: int, available: float) -> str:
    """How to shard what every step needs; the largest fsdp that divides `hidden` is the best."""
    taken = f"{format_bytes(arguments)} of {format_bytes(available)} per chip"
    why = f"parameters, moments and batch alone take {taken}"
    shards = batch_shards(mesh)
    fsdp = math.gcd(shards, hidden)
    if hidden % mesh.shape["fsdp"] or fsdp > mesh.shape["fsdp"]:
        return (
            f"parallel.data {shards // fsdp}, parallel.fsdp {fsdp}: {why}; "
            f"a width of {hidden} cannot be sharded further"
        )
    chips = mesh.size * math.ceil(arguments / available)
    return f"a topology of {chips} chips or more, sharded by parallel.fsdp: {why}"


def inference_advice(batch: int, params: int, memory: Memory, available: float) -> Iterator[str]:
    """What to change so that prefill or decode fits; batches are powers of two.

    Args:
      params: bytes of the parameters, which any batch needs.
    """
    fitting = int((available - params) * batch // (memory.total - params))
    if fitting >= 1:
        fitting = 1 << (fitting.bit_length() - 1)
        per_sequence = format_bytes((memory.total - params) / batch)
        yield (
            f"--batch {fitting}: a sequence takes {per_sequence}, parameters {format_bytes(params)}"
        )
    else:
        yield "a shorter --context, compute.dtype bfloat16, or a chip with more memory"


def _sequences(count: int) -> str:
    return f"{count} sequence" + "s" * (count > 1)
