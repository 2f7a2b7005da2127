"""`hymba compile`, with CPUs in the chips' place, and with the compiler of TPUs where it is."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from hymba_jax import cli
from hymba_jax.aot import command
from hymba_jax.aot.cost import ProgramCost
from hymba_jax.aot.estimate import Work
from hymba_jax.aot.fit import Memory
from hymba_jax.aot.instructions import InstructionCost
from hymba_jax.aot.topology import Topology, parse_topology
from hymba_jax.config.parallel import ParallelConfig
from hymba_jax.parallel.mesh import make_mesh

ROOT = Path(__file__).parents[2]
CONFIG = """
[model]
vocab_size = 64
hidden_size = 64
mlp_size = 128
layers = "2*L"
num_meta_tokens = 16
max_positions = 512
attention = { num_heads = 4, num_kv_heads = 2, window = 64, rope_type = "default" }

[compute]
dtype = "bfloat16"

[data]
tokenizer = "bytes"
sequence_length = 112

[training]
batch_size = 8
gradient_accumulation_steps = 2
sample_tokens = 8
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def four_cpus(monkeypatch):
    monkeypatch.setattr(Topology, "devices", lambda _: jax.devices("cpu")[:4])


@pytest.fixture
def no_compiler(monkeypatch):
    """In place of compiling, which `test_a_training_step` does: a program that costs 1 of each."""
    cost = ProgramCost(Work(1, 1, 1), [], 0, {}, [InstructionCost("mlp", 1, 1, 0)])
    monkeypatch.setattr(command, "compile_and_analyze", lambda *_: (Memory(1, 1, 2), cost))


def compile_for(capsys, *arguments):
    """The lines before tables, the last values of their rows by their names, and those after."""
    cli.main(["compile", *map(str, arguments)])
    return parse(capsys.readouterr().out)


def parse(printed):
    lines = printed.splitlines()
    rows = [line.strip("│ ").split("│") for line in lines if line.startswith("│")]
    words = [line for line in lines if line[:1] not in "┌├│└"]
    return words, {row[0].strip(): row[-1].strip() for row in rows}


def test_a_training_step(capsys, config, four_cpus):
    words, table = compile_for(
        capsys, "--config", config, "--topology", "v5e:2x2", "--parallel.tensor", 2, "--by-part"
    )
    assert words[0].endswith("v5e:2x2: training, 8 sequences of 112 tokens per step, 4 at a time")
    assert words[1].startswith(
        "4 devices, data 1 x fsdp 2 x sequence 1 x tensor 2; sharded: batch over 2"
    )
    assert "197 TFLOP/s" in words[-1]
    assert table["total, fits in 16.00 GB"].endswith((" GB", " MB"))
    counts = {name: int(name.split(" x ")[0]) for name in table if " x " in name}
    # Layers, micro-batches, and what both have to do: no loop's body is counted once.
    assert sum(n for name, n in counts.items() if "all-reduce" in name) > 2 * 2
    steps = ("arithmetic alone", "memory alone", "interconnect alone")
    assert table["step time, lower bound"] in [table[name] for name in steps]
    assert "step time, estimated" in table
    assert {"mlp/projection", "attention/rope", "logits"} <= {*table}


@pytest.mark.usefixtures("four_cpus", "no_compiler")
def test_every_stage_of_a_run(capsys, config):
    config.write_text(
        CONFIG
        + """
[[stages]]
name = "short"
steps = 10

[[stages]]
name = "long"
steps = 5
sequence_length = 224
batch_size = 4
gradient_accumulation_steps = 1
"""
    )
    words, _ = compile_for(capsys, "--config", config, "--topology", "v5e:2x2")
    told = [line for line in words if line.startswith("stage ") or "per step" in line]
    assert [line.split(": ")[-1] for line in told] == [
        "steps 1 to 10",
        "training, 8 sequences of 112 tokens per step, 4 at a time",
        "steps 11 to 15",
        "training, 4 sequences of 224 tokens per step, 4 at a time",
    ]
    arguments = ("--config", config, "--topology", "v5e:2x2", "--stage")
    assert "the run has short, long" in refusal(capsys, *arguments, "other")[0]


@pytest.mark.usefixtures("four_cpus", "no_compiler")
def test_stages_with_one_program_compile_it_once(capsys, config):
    stages = ('name = "stable"\nschedule = "constant"', 'name = "decay"\nschedule = "linear"')
    config.write_text(CONFIG + "".join(f"\n[[stages]]\n{stage}\nsteps = 10\n" for stage in stages))
    words, _ = compile_for(capsys, "--config", config, "--topology", "v5e:2x2")
    assert sum(line.startswith("compiled in") for line in words) == 1
    assert words[-2:] == ["stage decay: steps 11 to 20", "the same program as stage stable"]


TUNED = """
[adapter]
kind = "dora"
rank = 4

[compute]
dtype = "bfloat16"

[training]
batch_size = 4
"""
MAPS = {  # inputs and outputs of those of a layer of the 125M
    "query, in, gate, out": [(512, 512), (512, 1024), (512, 1024), (1024, 512)],
    "x, dt": [(1024, 64), (32, 1024)],
    "MLP": [(512, 1664), (512, 1664), (1664, 512)],
    "key, value": [(512, 256), (512, 512)],
}
DORA_125M = sum(
    (13 if part == "key, value" else 24)  # the other 11 layers reuse those of a neighbor
    * (4 * (inputs + outputs) + outputs)  # A, B, magnitudes
    for part, maps in MAPS.items()
    for inputs, outputs in maps
)
PAIRS = """
[training]
objective = "dpo"
batch_size = 4

[data]
path = "pairs.jsonl"
format = "preference"
packing = "documents"
validation_packing = "documents"
"""
STUDENT = CONFIG.replace("vocab_size = 64", 'vocab_size = "auto"').replace(
    "[training]", '[distill]\nteacher = "nowhere"\n\n[training]\nobjective = "distill"'
)


@pytest.mark.usefixtures("four_cpus", "no_compiler")
@pytest.mark.parametrize(
    ("text", "arguments", "told"),
    [
        (TUNED, ["--preset", "hymba-125m"], f"training {DORA_125M:,} of them, 4 sequences of 512"),
        (PAIRS, ["--preset", "hymba-125m"], "training by dpo, 4 sequences of 512 tokens"),
        (STUDENT, ["--teacher-preset", "hymba-125m"], "training by distill, 8 sequences of 112"),
    ],
    ids=["an adapter", "preferences", "a student"],
)
def test_what_starts_from_another_model(capsys, config, text, arguments, told):
    config.write_text(text)
    words, table = compile_for(capsys, "--config", config, "--topology", "v5e:2x2", *arguments)
    assert told in words[0]
    assert "model FLOPs per step and chip" in table


@pytest.mark.usefixtures("four_cpus", "no_compiler")
@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (TUNED, [], "no model is named: use --preset hymba-1.5b, --init-from DIRECTORY, or a"),
        (TUNED, ["--preset", "hymba-1b"], "preset is 'hymba-1b', not one of hymba-125m, "),
        (CONFIG, ["--preset", "hymba-125m"], "--preset hymba-125m and [model] of "),
        (CONFIG, ["--teacher-preset", "hymba-125m"], "and the run has no objective distill"),
        (STUDENT, [], "nowhere: no model found"),
        (
            STUDENT,
            ["--teacher-preset", "hymba-125m", "--program", "decode"],
            "teacher_preset hymba-125m applies to training only",
        ),
    ],
)
def test_models_that_are_not_named_or_twice(capsys, config, text, arguments, message):
    config.write_text(text)
    assert message in refusal(capsys, "--config", config, "--topology", "v5e:2x2", *arguments)[0]


@pytest.mark.parametrize(
    ("program", "batch", "step"),
    [
        ("prefill", 2, "prefill of 2 prompts of 200 tokens"),
        ("decode", 3, "decoding 4 sequences of 200 tokens, one token each per step"),
    ],
)
def test_inference(capsys, config, four_cpus, program, batch, step):
    sizes = ("--program", program, "--batch", batch, "--context", 200)
    words, table = compile_for(capsys, "--config", config, "--topology", "v6e:2x2", *sizes)
    assert words[0].endswith(f"v6e:2x2: {step}")
    assert words[1] == "one of 4 chips, as generating uses one"
    assert "total, fits in 32.00 GB" in table


def refusal(capsys, *arguments):
    """The one line that the command stops with, and what it printed before."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["compile", *map(str, arguments)])
    message = str(caught.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message, capsys.readouterr().out


def test_a_step_that_does_not_fit(capsys, config, four_cpus, monkeypatch):
    """The compiler refuses it: 10 GB of arguments and 12 of temporaries, for a sequence a chip."""
    memory = Memory(10 * 10**9, 12 * 10**9, 22 * 10**9)
    monkeypatch.setattr(command, "compile_and_analyze", lambda *_: (memory, None))
    message, printed = refusal(capsys, "--config", config, "--topology", "v5e:2x2")
    assert message == "error: it does not fit: 22.00 GB of 16.00 GB per chip"
    words, table = parse(printed)
    assert table["total, does not fit in 16.00 GB"] == "22.00 GB"
    assert [line.split(":")[0] for line in words if "to make it fit" in line] == [
        "to make it fit, compute.remat block",
        "to make it fit, a topology of 8 chips with parallel.sequence 2",
    ]
    stage = '[[stages]]\nname = "long"\nsteps = 10\ngradient_accumulation_steps = 1'
    config.write_text(f'{CONFIG}[[stages]]\nname = "short"\nsteps = 10\n{stage}')
    _, printed = refusal(capsys, "--config", config, "--topology", "v5e:2x2")
    assert "to make it fit, stages.long.gradient_accumulation_steps 2: " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e"], "not a chip and a shape"),
        (["--topology", "v5e:2x2", "--batch", 2], "batch and context apply to prefill and decode"),
        (
            ["--topology", "v5e:2x2", "--kv-cache", "int8"],
            "weights and kv_cache apply to prefill and",
        ),
        (["--topology", "v5e:2x2", "--parallel.tensor", 3], "is not the number of devices, 4"),
        (
            ["--topology", "v5e:2x2", "--training.gradient-accumulation-steps", 4],
            "devices cannot share equally",
        ),
        (
            ["--topology", "v5e:2x2", "--program", "decode", "--context", 600],
            "a context of 600 tokens: the model's is 1 to 512",
        ),
        (["--topology", "v5e:2x2", "--program", "decode", "--batch", 0], "batch is 0"),
    ],
)
def test_what_cannot_be_compiled(capsys, config, four_cpus, arguments, message):
    assert message in refusal(capsys, "--config", config, *arguments)[0]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed")
def test_with_the_compiler_of_tpus(config):
    """In a process of its own: JAX and its compilers read the environment once."""
    hymba = "import sys; from hymba_jax.cli import main; main(sys.argv[1:])"
    arguments = ["compile", "--config", config, "--topology", "v5e:2x2", "--parallel.tensor", "2"]
    done = subprocess.run(
        [sys.executable, "-c", hymba, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    _, table = parse(done.stdout)
    assert "total, fits in 16.00 GB" in table
    assert "loops of unknown trip count, counted once" not in table
    assert any("all-gather" in name for name in table)
    # Half of 4 sequences, 16 + 112 positions, half of 128 channels; layers, micro-batches.
    assert table["4 x selective_scan_forward per chip, largest array"] == "2 x 128 x 64"
    assert table["4 x selective_scan_backward per chip, largest array"] == "2 x 128 x 64"
    assert any("attention_forward" in name for name in table)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed")
def test_part_of_a_torus_axis_can_be_a_mesh_axis():
    mesh = make_mesh(parse_topology("v6e:4x4").devices(), ParallelConfig(data=-1, fsdp=8))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "sequence": 1, "tensor": 1}
