"""What `hymba memory` says, against the paper and against what is allocated."""

import dataclasses
import math
from unittest.mock import Mock

import jax
import pytest
from flax import nnx
from inference.models import TINY, byte_tokenizer, make_model

from hymba_jax import cli
from hymba_jax.analysis.memory import gb, param_bytes, training_bytes
from hymba_jax.checkpoint.model_file import read_model
from hymba_jax.checkpoint.train_state import abstract_train_state, init_state
from hymba_jax.config import PRESETS, AttentionConfig, ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.inference import LanguageModel
from hymba_jax.inference.engine import Engine
from hymba_jax.inference.memory import cache_bytes, meta_state_bytes
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import param_shapes
from hymba_jax.model.trainable import Trainable
from hymba_jax.parallel.memory import check_fits
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.training.optimizer import make_optimizer

MB, GB = 10**6, 10**9


def total(sizes):
    return sum(sizes.values())


def ablation(layers, heads=1, num_meta_tokens=0):
    """The paper's 300M: heads of 16 and 32 channels, 768 SSM channels, no convolution inputs."""
    return HymbaConfig(
        hidden_size=384,
        layers=layers,
        attention=AttentionConfig(
            num_heads=heads, num_kv_heads=heads, head_dim=16, value_dim=32, window=256
        ),
        ssm=SSMConfig(expand=2, state_size=16, conv_kernel=1),
        fusion="concat",
        num_meta_tokens=num_meta_tokens,
    )


MAMBA = HymbaConfig(hidden_size=768, layers="32*M")
LLAMA = HymbaConfig(
    hidden_size=3072,
    layers="28*A",
    attention=AttentionConfig(num_heads=24, num_kv_heads=8, head_dim=128, value_dim=128),
)


def test_a_cache_of_8_bits():
    """A byte for each key and value of the 1.5B, and a scale for those of each head and token."""
    sizes = cache_bytes(PRESETS["hymba-1.5b"], 8192, "bfloat16", "bfloat16", "int8")
    for kind, slots in (("global", 3 * 8192 * 5), ("window", 14 * 1024 * 5)):
        assert sizes[f"{kind} KV, int8"] == slots * (64 + 128)
        assert sizes[f"{kind} KV, bfloat16"] == slots * 2 * 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MAMBA, "1.87"),
        (ablation("32*G", heads=4), "99.09"),
        (ablation("32*G", heads=8), "197.39"),
        (ablation("32*G", heads=16), "394.00"),
        (ablation("32*G", heads=6), "148.24"),
        (ablation("32*W", heads=6), "5.51"),
        (ablation("8*G 24*W", heads=6), "41.19"),
        (ablation("8*G 12*Ww", heads=6), "39.42"),
    ],
)
def test_rows_of_the_papers_table_1(config, expected):
    assert config.num_layers == 32
    assert f"{total(cache_bytes(config, 8000, 'bfloat16', 'bfloat16')) / MB:.2f}" == expected


def test_meta_tokens_of_table_1_are_held_once():
    """The paper counts what the meta tokens leave in the 8 global layers."""
    config = ablation("8*G 12*Ww", heads=6, num_meta_tokens=128)
    sequence = total(cache_bytes(config, 8000, "bfloat16", "bfloat16"))
    assert f"{sequence / MB:.2f}" == "39.42"
    meta = meta_state_bytes(config, "bfloat16")
    assert f"{(sequence + meta['global KV, bfloat16']) / MB:.2f}" == "40.01"


def test_caches_of_whole_models():
    hymba = cache_bytes(PRESETS["hymba-1.5b"], 8192, "bfloat16", "bfloat16")
    assert f"{total(hymba) / MB:.1f}" == "78.6"
    llama = cache_bytes(LLAMA, 8000, "bfloat16", "bfloat16")
    assert f"{llama['global KV, bfloat16'] / MB:.0f}" == "918"
    assert len(llama) == 1


def allocated(tree):
    return sum(array.nbytes for array in jax.tree.leaves(tree))


@pytest.mark.parametrize(("context", "state_dtype"), [(4, "float32"), (100, "bfloat16")])
def test_an_engine_allocates_what_is_counted(context, state_dtype):
    hymba = make_model()
    model = LanguageModel(hymba, byte_tokenizer(), state_dtype=state_dtype, context=context)
    read = model.engine.prefill([[1, 2], [3], [4]], context=3)
    rows = 4  # of the batch that three prompts are put in
    counted = cache_bytes(TINY, context, "float32", state_dtype)
    assert allocated(read.cache.layers) == rows * total(counted)
    assert allocated(model.engine.meta_state) == total(meta_state_bytes(TINY, "float32"))
    assert allocated(model.engine.params) == param_bytes(TINY, "float32")


def test_uses_are_told_apart():
    """Two window layers share keys and values; the window is 6, each text 4 or 100 long."""
    config = dataclasses.replace(TINY, layers="G Ww")
    kv, layers = 4 * (8 + 16), 3  # bytes of a position's keys and values in float32
    states = {
        "conv state, float32": layers * 4 * 3 * 32,
        "ssm state, bfloat16": layers * 2 * 4 * 32,
    }
    for context, slots in ((100, 6), (4, 4)):
        expected = {"global KV, float32": context * kv, "window KV, float32": slots * kv}
        assert cache_bytes(config, context, "float32", "bfloat16") == expected | states


def test_a_batch_is_so_many_sequences():
    one = total(cache_bytes(TINY, 50, "bfloat16", "float32"))
    compute = ComputeConfig(dtype="bfloat16", scan_layers=False)
    state = nnx.eval_shape(lambda: Hymba(TINY, compute, nnx.Rngs(0)).init_state(7, 50))
    assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.layers)) == 7 * one


def memory(capsys, *arguments):
    """The table that the command prints: the numbers of each row, in GB, by its name."""
    cli.main(["memory", *map(str, arguments)])
    printed = capsys.readouterr()
    assert printed.err == ""
    cells = [line.strip()[1:-1].split("│") for line in printed.out.splitlines() if "│" in line]
    return {
        name.strip(): [float(n.replace(",", "")) if n.strip() else None for n in numbers]
        for name, *numbers in cells
    }


def test_the_command_for_the_1_5b(capsys):
    table = memory(capsys, "--preset", "hymba-1.5b", "--batch", 16)
    one, many, _ = table["cache"]
    assert (one, many) == (0.0786, 1.26)
    assert one == pytest.approx(sum(numbers[0] for numbers in [*table.values()][:4]), abs=1e-4)
    assert table["ssm state, bfloat16"][0] == 0.00328  # 32 * 16 * 3200 * 2
    # 1.5228 billion; the SSM's A_log, D and time-step bias stay float32.
    params = 2 * 1.5228 + 2 * 32 * 3200 * (16 + 1 + 1) / GB
    assert table["parameters, bfloat16"] == [pytest.approx(params, abs=0.005)] * 2 + [None]
    fixed = params + table["meta tokens"][0]
    # Training: 4 bytes each for a parameter, its gradient and Adam's two moments.
    state = 4 * 1.5228
    assert table["trained parameters, float32"] == [None, None, pytest.approx(state, abs=0.005)]
    assert table["gradients, float32"][2] == pytest.approx(state, abs=0.005)
    assert table["optimizer state, adamw"][2] == pytest.approx(2 * state, abs=0.05)
    assert table["in all"] == [
        pytest.approx(fixed + one, abs=0.005),
        pytest.approx(fixed + many, abs=0.005),
        pytest.approx(4 * state, abs=0.05),
    ]


def test_the_command_for_a_config_file(capsys, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text('[model]\npreset = "hymba-125m"\nmax_positions = 256\nlayers = "2*M"\n')
    dtypes = ("--dtype", "float32", "--state-dtype", "bfloat16", "--param-dtype", "bfloat16")
    table = memory(capsys, "--config", path, *dtypes)
    assert not any("KV" in name for name in table)
    assert table["conv state, float32"] == [2.46e-5, 2.46e-5, None]  # 2 * 3 * 1024 * 4
    assert table["ssm state, bfloat16"] == [6.55e-5, 6.55e-5, None]  # 2 * 16 * 1024 * 2
    assert table["cache"] == [9.01e-5, 9.01e-5, None]
    params, gradients = (
        table[f"{name}, bfloat16"][2] for name in ("trained parameters", "gradients")
    )
    assert params == gradients == pytest.approx(table["parameters, float32"][0] / 2, rel=0.02)


def test_the_context_is_that_of_the_model_unless_another_is_asked_for(capsys, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text('[model]\npreset = "hymba-125m"\nmax_positions = 256\nlayers = "G"\n')
    own, asked, longer = (
        memory(capsys, "--config", path, *context)
        for context in ((), ("--context", 256), ("--context", 512))
    )
    assert own == asked
    assert own["cache"][0] < longer["cache"][0]


def test_gradients_of_micro_batches_are_added_up_in_float32(capsys, tmp_path):
    """In some stage or in all, whatever the dtype of the parameters."""
    path = tmp_path / "small.toml"
    model = '[model]\npreset = "hymba-125m"\nlayers = "2*M"\n'
    stages = '[[stages]]\nname = "one"\nsteps = 5\n[[stages]]\nname = "two"\nsteps = 5\n'
    for more in (
        "[training]\ngradient_accumulation_steps = 2\n",
        "[training]\nreduction_shards = 4\n",
        f"{stages}gradient_accumulation_steps = 2\n",
    ):
        path.write_text(model + more)
        table = memory(capsys, "--config", path, "--param-dtype", "bfloat16")
        params = table["trained parameters, bfloat16"][2]
        assert table["gradients, float32"][2] == pytest.approx(2 * params, rel=0.02)


def test_the_optimizer_is_that_of_the_config_file(capsys, tmp_path):
    """Muon has one moment of a kernel, AdamW two; the moving average is a copy of all."""
    path = tmp_path / "small.toml"
    model = '[model]\npreset = "hymba-125m"\nlayers = "2*M"\n'
    path.write_text(model + '[training]\noptimizer = "muon"\nema_decay = 0.999\n')
    table = memory(capsys, "--config", path)
    shapes = param_shapes(read_model(path)[0], scan_layers=False)
    sizes = {path: 4 * math.prod(shape) / GB for path, shape in shapes.items()}
    kernels = sum(size for path, size in sizes.items() if path[-1] == "kernel")
    expected = 3 * total(sizes) - kernels
    found = table["optimizer state, muon, EMA"][2]
    assert found == pytest.approx(expected, rel=0.005)  # three digits


def test_a_training_state_takes_what_is_counted():
    counted = training_bytes(TINY, "float32")
    compute = ComputeConfig()
    optimizer = make_optimizer(TrainingConfig())
    abstract = abstract_train_state(TINY, compute, optimizer, make_mesh(jax.devices()[:1]))
    state = init_state(TINY, compute, optimizer, abstract, seed=0)
    assert allocated(state.params) == counted.params == counted.gradients
    assert allocated(state.optimizer) == counted.optimizer


def test_an_adapter_has_gradients_and_moments_alone():
    """In float32, whatever the frozen parameters are in."""
    adapter = AdapterConfig(kind="lora", rank=2, targets=("up_proj",))
    size = 2 * 2 * (TINY.hidden_size + TINY.mlp_size)  # in two layers
    counted = training_bytes(TINY, "bfloat16", Trainable(adapter))
    assert counted.params == training_bytes(TINY, "bfloat16").params + 4 * size
    assert counted.gradients == 4 * size
    assert counted.optimizer - 8 * size < 100  # counts and the learning rate


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (24_576, "0.0000246"),
        (78_600_000, "0.0786"),
        (3_049_999_999, "3.05"),
        (12_345_000_000, "12.3"),
        (4_321_000_000_000, "4,321"),
    ],
)
def test_gigabytes(size, text):
    assert gb(size) == text


def test_what_is_larger_than_the_devices_memory_is_refused(monkeypatch):
    """On a CPU its host's, which is asked for what there is; before anything is allocated."""
    model = LanguageModel(make_model(), byte_tokenizer(), batch_size=10**10)
    monkeypatch.setattr(Engine, "prefill", None)
    needed = allocated(model.engine.params) + total(meta_state_bytes(TINY, "float32"))
    state = model.engine.init_state(4, 200)
    needed += allocated((state.cache.layers, state.seen, state.counts, state.bias))
    monkeypatch.setattr("hymba_jax.parallel.memory.host_memory", lambda: needed)
    assert model.stream(["a", "b", "c"], max_new_tokens=200)
    monkeypatch.setattr("hymba_jax.parallel.memory.host_memory", lambda: needed - 1)
    for ask, options in ((model.generate, {"max_new_tokens": 200}), (model.log_probs, {})):
        with pytest.raises(HymbaError) as error:
            ask(["a", "b", "c"], **options)
        assert str(error.value) == (
            f"4 sequences of 256 tokens beside the model's parameters: {needed / 1e6:.1f} MB, and "
            f"cpu has {needed / 1e6:.1f} MB of memory: reduce batch_size, context or max_new_tokens"
        )
    message = "1048576 sequences of 512 tokens beside"
    with pytest.raises(HymbaError, match=message):
        model.generate("a", max_new_tokens=10**9, num_samples=2**20, temperature=1.0)
    monkeypatch.setattr("hymba_jax.parallel.memory.host_memory", lambda: 10)
    with pytest.raises(HymbaError, match="1 sequences of 512 tokens"):
        LanguageModel(make_model(), byte_tokenizer(), context=512)


def test_the_limit_that_a_device_names():
    device = Mock(spec=jax.Device, platform="gpu", device_kind="a chip", process_index=0)
    device.memory_stats.return_value = {"bytes_limit": 10**9}
    check_fits("this", 10**9, [device], "")
    check_fits("this", 2 * 10**9, [device, device], "")
    with pytest.raises(HymbaError, match=r"this: 1.50 GB, and a chip has 1.00 GB .* shrink it"):
        check_fits("this", 1_500_000_000, [device], "shrink it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either a preset or a config"),
        (["--preset", "hymba-1.5b", "--config", "a.toml"], "name either a preset or a config"),
        (["--preset", "hymba-7b"], "preset is 'hymba-7b', not one of hymba-125m, hymba-350m, hymb"),
        (["--config", "gone.toml"], "gone.toml: no such file"),
        (["--preset", "hymba-1.5b", "--context", "0"], "context is 0, not between 1 and 21474836"),
        (["--preset", "hymba-1.5b", "--batch", "-1"], "batch is -1, not between 1 and 2147483647"),
        (["--preset", "hymba-1.5b", "--context", "9" * 30], f"context is {'9' * 30}, not between"),
    ],
)
def test_what_cannot_be_counted(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["memory", *arguments])
    assert str(stopped.value).startswith(f"error: {message}")
    assert "\n" not in str(stopped.value)
