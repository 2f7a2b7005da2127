"""What to change where memory is short, from numbers whose answer is known."""

import jax
import pytest
from jax.sharding import AbstractMesh

from hymba_jax.aot.fit import (
    Memory,
    compiled_memory,
    inference_advice,
    refused_memory,
    training_advice,
)
from hymba_jax.config import ComputeConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig

GB = 10**9


def advice(
    arguments,
    temporaries,
    *,
    remat="block",
    batch=64,
    accumulation=2,
    reduction_shards=0,
    table="training",
    data=1,
    sequence=1,
    parts=8,
):
    """On chips of 16 GB, batches in so many shards; in GB, without the reasons."""
    training = TrainingConfig(
        batch_size=batch,
        gradient_accumulation_steps=accumulation,
        reduction_shards=reduction_shards,
    )
    run = RunConfig(compute=ComputeConfig(remat=remat), training=training)
    mesh = AbstractMesh((data, parts // data, sequence), ("data", "fsdp", "sequence"))
    memory = Memory(arguments * GB, temporaries * GB, (arguments + temporaries) * GB)
    return [line.split(":")[0] for line in training_advice(run, mesh, table, memory, 16 * GB)]


def test_fewer_sequences_at_a_time():
    """4 sequences a chip take 20 GB, and 10 are left: 2 do."""
    assert advice(6, 20) == ["training.gradient_accumulation_steps 4"]


def test_a_third_of_the_memory_is_a_quarter_of_the_sequences():
    """No 4 / 3 of a sequence can be had."""
    assert advice(6, 30) == ["training.gradient_accumulation_steps 8"]


def test_recomputing_comes_first():
    assert advice(6, 20, remat="none") == [
        "compute.remat block",
        "training.gradient_accumulation_steps 4",
    ]


def test_a_stage_has_gradient_accumulation_of_its_own():
    assert advice(6, 20, table="stages.long") == ["stages.long.gradient_accumulation_steps 4"]


def test_shards_of_a_fixed_order_are_smaller_or_given_up():
    """8 sequences of 2.5 GB in a shard, of which a chip has one at a time, and 10 GB are left."""
    fixed = {"accumulation": 1, "reduction_shards": 8, "data": 8}
    assert advice(6, 20, **fixed) == ["training.reduction_shards 16"]
    assert advice(20, 1, **fixed) == ["training.reduction_shards 0"]
    assert advice(6, 160, **fixed) == [
        "training.reduction_shards 64",
        "training.reduction_shards 0",
    ]


def test_one_sequence_that_is_too_large_is_shared():
    """By the same chips, where twice the state and half the sequence fit, or else by more."""
    assert advice(2, 20, batch=8, accumulation=1) == [
        "parallel.sequence 2, parallel.fsdp 4, training.gradient_accumulation_steps 2"
    ]
    assert advice(6, 20, batch=8, accumulation=1) == [
        "a topology of 16 chips with parallel.sequence 2"
    ]
    assert advice(6, 25, batch=8, accumulation=1, sequence=2) == [
        "a topology of 64 chips with parallel.sequence 8"
    ]
    assert advice(6, 80) == [
        "training.gradient_accumulation_steps 8",
        "a topology of 16 chips with parallel.sequence 2",
    ]
    assert advice(2, 80) == [
        "training.gradient_accumulation_steps 8",
        "parallel.sequence 2, parallel.fsdp 4, training.gradient_accumulation_steps 16",
    ]


def test_state_that_is_too_large_is_sharded():
    assert advice(20, 1) == ["a topology of 16 chips or more, sharded by parallel.fsdp"]
    assert advice(20, 1, data=2) == ["parallel.data 1, parallel.fsdp 8"]
    assert advice(20, 1, parts=256, batch=1024) == ["parallel.data 4, parallel.fsdp 64"]  # of 1600


def test_fewer_sequences():
    """4 GB of parameters, and 8 sequences of 2.5 GB each: 4 fit in the 12 that are left."""
    memory = Memory(20 * GB, 4 * GB, 24 * GB)
    (line,) = inference_advice(8, 4 * GB, memory, 16 * GB)
    assert line == "--batch 4: a sequence takes 2.50 GB, parameters 4.00 GB"
    (line,) = inference_advice(8, 4 * GB, memory, 20 * GB)  # where 6 would fit
    assert line.startswith("--batch 4:")
    (line,) = inference_advice(1, 4 * GB, memory, 16 * GB)
    assert line.startswith("a shorter --context")


@pytest.mark.parametrize(
    ("phrase", "temporaries", "total"),
    [
        ("HLO temporaries (2.50G)", 2.5 * 2**30, 2.5 * 2**30 + GB),
        ("arguments and HLO temporaries (2.50G)", 2.5 * 2**30 - GB, 2.5 * 2**30),
    ],
)
def test_a_refusal_of_the_tpus_compiler(phrase, temporaries, total):
    error = RuntimeError(
        f"RESOURCE_EXHAUSTED: the total memory required for {phrase} exceeds available HBM (2G)"
    )
    assert refused_memory(error, GB) == Memory(GB, round(temporaries), round(total))
    assert refused_memory(RuntimeError("INTERNAL: something else"), GB) is None


def test_what_is_donated_counts_once():
    shape = jax.ShapeDtypeStruct((1000,), "float32")
    add = jax.jit(lambda a, b: (a + b, a - b), donate_argnums=0)
    memory = compiled_memory(add.lower(shape, shape).compile())
    assert memory.arguments == 8000
    assert memory.total - memory.temporaries >= 12000
