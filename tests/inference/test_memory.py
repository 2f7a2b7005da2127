"""What `hymba memory` says, against the paper and against what is allocated."""

import jax
import pytest
from inference.models import TINY, byte_tokenizer, make_model

from hymba_jax import cli
from hymba_jax.config import PRESETS, AttentionConfig, HymbaConfig, SSMConfig
from hymba_jax.inference import LanguageModel
from hymba_jax.inference.memory import CacheBytes, cache_bytes, param_bytes, prefix_bytes
from hymba_jax.model.cache import empty_cache

MB = 10**6


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
    assert f"{cache_bytes(config, 8000, 'bfloat16', 'bfloat16').total / MB:.2f}" == expected


def test_meta_tokens_of_table_1_are_held_once():
    """The paper counts what the meta tokens leave in the 8 global layers."""
    config = ablation("8*G 12*Ww", heads=6, num_meta_tokens=128)
    text = cache_bytes(config, 8000, "bfloat16", "bfloat16")
    assert f"{text.total / MB:.2f}" == "39.42"
    meta = prefix_bytes(config, "bfloat16")
    assert f"{(text.total + meta.global_kv) / MB:.2f}" == "40.01"


def test_caches_of_whole_models():
    hymba = cache_bytes(PRESETS["hymba-1.5b"], 8192, "bfloat16", "bfloat16")
    assert f"{hymba.total / MB:.1f}" == "78.6"
    llama = cache_bytes(LLAMA, 8000, "bfloat16", "bfloat16")
    assert f"{llama.total / MB:.0f}" == "918"
    assert llama.window_kv == llama.conv_inputs == llama.ssm_states == 0


def allocated(tree):
    return sum(array.nbytes for array in jax.tree.leaves(tree))


@pytest.mark.parametrize(("context", "state_dtype"), [(4, "float32"), (100, "bfloat16")])
def test_an_engine_allocates_what_is_counted(context, state_dtype):
    hymba = make_model()
    model = LanguageModel(hymba, byte_tokenizer(), state_dtype=state_dtype, context=context)
    read = model.engine.prefill([[1, 2], [3], [4]], context=3)
    rows = 4  # of the batch that three texts are put in
    counted = cache_bytes(TINY, context, "float32", state_dtype)
    assert allocated(read.cache.layers) == rows * counted.total
    assert allocated(model.engine.prefix) == prefix_bytes(TINY, "float32").total
    assert allocated(model.engine.params) == param_bytes(TINY, "float32")


def test_uses_are_told_apart():
    """Two window layers share keys and values; the window is 6, each text 4 or 100 long."""
    kv, layers = 4 * (8 + 16), 3  # bytes of a position's keys and values in float32
    states = {"conv_inputs": layers * 4 * 3 * 32, "ssm_states": layers * 4 * 4 * 32}
    expected = CacheBytes(global_kv=100 * kv, window_kv=6 * kv, **states)
    assert cache_bytes(TINY, 100, "float32", "float32") == expected
    expected = CacheBytes(global_kv=4 * kv, window_kv=4 * kv, **states)
    assert cache_bytes(TINY, 4, "float32", "float32") == expected


def test_a_batch_is_so_many_texts():
    one = cache_bytes(TINY, 50, "bfloat16", "float32").total
    cache = jax.eval_shape(lambda: empty_cache(TINY, 7, 50, "bfloat16", "float32"))
    assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.layers)) == 7 * one


def memory(capsys, *arguments):
    """The table that the command prints: the numbers of each row by its name."""
    cli.main(["memory", *map(str, arguments)])
    printed = capsys.readouterr()
    assert printed.err == ""
    cells = [line.strip("│┃ ").split("│") for line in printed.out.splitlines() if "│" in line]
    return {name.strip(): [float(n.replace(",", "")) for n in numbers] for name, *numbers in cells}


def test_the_command_for_the_released_model(capsys):
    table = memory(capsys, "--preset", "hymba-1.5b", "--batch", 16)
    one, many = table["cache"]
    assert (one, many) == (pytest.approx(78.6, abs=0.05), pytest.approx(16 * one, abs=0.1))
    assert one == pytest.approx(sum(numbers[0] for numbers in [*table.values()][:4]), abs=0.02)
    assert table["SSM states, bfloat16"][0] == 3.28  # 32 * 16 * 3200 * 2
    params = table["parameters, bfloat16"][0]
    # 1.5 billion; the SSM's A_log, D and time-step bias stay float32.
    assert params == pytest.approx(2 * 1522.8 + 2 * 32 * 3200 * (16 + 1 + 1) / MB, abs=0.1)
    fixed = params + sum(
        numbers[0] for name, numbers in table.items() if name.startswith("meta tokens")
    )
    assert table["in all"] == [
        pytest.approx(fixed + one, abs=0.03),
        pytest.approx(fixed + many, abs=0.03),
    ]


def test_the_command_for_a_config_file(capsys, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text('[model]\npreset = "hymba-125m"\nmax_positions = 256\nlayers = "2*M"\n')
    table = memory(capsys, "--config", path, "--dtype", "float32", "--state-dtype", "bfloat16")
    assert table["keys and values, global layers, float32"] == [0, 0]
    assert table["inputs of the convolutions, float32"] == [0.02, 0.02]  # 2 * 3 * 1024 * 4
    assert table["SSM states, bfloat16"] == [0.07, 0.07]  # 2 * 16 * 1024 * 2
    assert table["cache"] == [0.09, 0.09]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either a preset or a config"),
        (["--preset", "hymba-1.5b", "--config", "a.toml"], "name either a preset or a config"),
        (["--preset", "hymba-7b"], "preset is 'hymba-7b', not one of hymba-125m, hymba-350m, hymb"),
        (["--config", "gone.toml"], "gone.toml: no such file"),
        (["--preset", "hymba-1.5b", "--context", "0"], "context 0 and batch 1: both are at least"),
        (["--preset", "hymba-1.5b", "--batch", "-1"], "context 8192 and batch -1: both are at l"),
    ],
)
def test_what_cannot_be_counted(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["memory", *arguments])
    assert str(stopped.value).startswith(f"error: {message}")
    assert "\n" not in str(stopped.value)
