"""Adapters in PEFT's format: read as peft reads them, written so that nothing is lost."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from inference.models import byte_tokenizer
from safetensors.numpy import load_file, save_file
from slow import slow_but

from hymba_jax.checkpoint.load import load_model
from hymba_jax.checkpoint.save import save_model
from hymba_jax.config import AttentionConfig, ComputeConfig, HymbaConfig, SSMConfig
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.convert.export import ExportConfig
from hymba_jax.convert.export import main as export
from hymba_jax.convert.peft import WEIGHTS, merge_peft, peft_tokenizer, read_peft, write_peft
from hymba_jax.errors import HymbaError
from hymba_jax.hf_files import ADAPTER_CONFIG
from hymba_jax.model import Hymba, merge_adapters, stack_layers
from hymba_jax.tokenizer import Tokenizer, build_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = HymbaConfig(
    vocab_size=61,
    hidden_size=16,
    mlp_size=24,
    layers="G 2*Ww",
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, window=4),
    num_meta_tokens=3,
    max_positions=64,
)
MIXED = ("query_proj", "ssm.in_proj", "x_proj", "mlp")  # two of the five parts of in_proj


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model))


def make_base(**compute):
    return Hymba(MODEL, ComputeConfig(**compute), nnx.Rngs(0))


def write(directory, kind, targets=MIXED, rank=3):
    """Writes the adapter of a model with this base, and returns the model."""
    adapter = AdapterConfig(kind=kind, rank=rank, targets=targets)
    model, rng = Hymba(MODEL, ComputeConfig(), nnx.Rngs(0), adapter), np.random.default_rng(1)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if "adapter" in path:
            leaf[...] += 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    directory.mkdir(exist_ok=True)
    write_peft(
        directory, params_of(model), MODEL, adapter, scan_layers=True, base_model="models/base"
    )
    return model


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_what_peft_wrote_is_merged_as_peft_merges_it(kind):
    """To the rounding of float32."""
    directory = GOLDEN / f"peft-{kind}"
    adapters, metadata = read_peft(directory)
    assert metadata == {"format": "pt"}
    base, merged = (load_file(directory / f"{name}.safetensors") for name in ("base", "merged"))
    assert {f"{module}.weight" for module in adapters} == base.keys()
    for module, update in adapters.items():
        kernel = update.merged(jnp.asarray(base[f"{module}.weight"].T))
        np.testing.assert_allclose(kernel.T, merged[f"{module}.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_round_trip_changes_nothing(kind, scan_layers, tmp_path):
    """But for the order of sums: blocks of zeros are added, and `scale` is another quotient."""
    adapted = write(tmp_path, kind)
    expected = flatten_dict(params_of(merge_adapters(adapted)))
    merged = merge_peft(tmp_path, make_base(scan_layers=scan_layers))
    if not scan_layers:
        merged = stack_layers(merged)
    for path, kernel in flatten_dict(params_of(merged)).items():
        np.testing.assert_allclose(kernel, expected[path], rtol=0, atol=1e-6, err_msg=str(path))


def test_the_files_are_those_of_peft(tmp_path):
    """The matrices are put together by hand, in float64, as peft computes with them."""
    adapted = write(tmp_path, "lora")
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    golden = json.loads((GOLDEN / "peft-lora" / ADAPTER_CONFIG).read_text())
    assert settings.keys() <= golden.keys()
    assert settings["target_modules"] == [
        "mamba.in_proj",
        "mamba.x_proj.0",
        "moe.experts.0.down_proj",
        "moe.experts.0.gate_proj",
        "moe.experts.0.up_proj",
    ]
    name = "model.layers.3.mamba.in_proj"
    assert (settings["r"], settings["rank_pattern"][name]) == (3, 6)
    tensors = load_file(tmp_path / WEIGHTS)
    A, B = (
        np.float64(tensors[f"base_model.model.{name}.lora_{side}.weight"]) for side in ("A", "B")
    )
    delta = settings["alpha_pattern"][name] / 6 * B @ A
    mixer = adapted.groups[1].group.blocks[0].mixer  # layers 1 and 3 are stacked
    parts = [mixer.attention.query_proj, mixer.attention.key_proj, mixer.attention.value_proj]
    parts += [mixer.ssm.in_proj, mixer.ssm.gate_proj]
    start = 0
    for linear in parts:
        stop = start + linear.kernel.shape[-1]
        expected = np.zeros((stop - start, 16))
        if linear.adapter is not None:
            A, B = (np.float64(side.kernel[1]) for side in (linear.adapter.A, linear.adapter.B))
            expected = 32 / 3 * (A @ B).T
        np.testing.assert_allclose(delta[start:stop], expected, rtol=0, atol=1e-6)
        start = stop
    assert len(delta) == start


def test_a_projection_that_some_layers_lack_is_named_in_full(tmp_path):
    write(tmp_path, "lora", targets=("key_proj",))
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert settings["target_modules"] == [f"model.layers.{i}.mamba.in_proj" for i in (0, 1, 3)]
    assert settings["rank_pattern"] == {}


def edit(directory, **settings):
    held = json.loads((directory / ADAPTER_CONFIG).read_text())
    (directory / ADAPTER_CONFIG).write_text(json.dumps(held | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and only LORA is supported"),
        ({"r": 0}, "r and its pattern have [0], not numbers from 1"),
        ({"lora_bias": True}, "lora_bias is True, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], which is not"),
        ({"brand_new": 3}, "brand_new is 3, which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"use_dora": 1}, "use_dora is 1, not true or false"),
    ],
)
def test_options_that_change_what_it_computes_are_refused(settings, message, tmp_path):
    write(tmp_path, "lora", targets=("x_proj",))
    edit(tmp_path, **settings)
    with pytest.raises(HymbaError) as caught:
        read_peft(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / ADAPTER_CONFIG}: {message}")


def test_the_data_that_an_adapter_was_initialized_by_is_no_matter(tmp_path):
    write(tmp_path, "lora", targets=("x_proj",))
    edit(tmp_path, init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.99})
    adapters, _ = read_peft(tmp_path)
    assert len(adapters) == MODEL.num_layers


def test_tensors_that_do_not_fit_the_options_are_refused(tmp_path):
    write(tmp_path, "lora", targets=("x_proj",))
    for settings, message in (
        ({"r": 4}, "model.layers.0.mamba.x_proj.0 has shapes (3, 32) and (33, 3), not of rank 4"),
        ({"rank_pattern": {"(": 3}}, "model.layers.0.mamba.x_proj.0 has the pattern '(', which"),
        (
            {"r": 3, "rank_pattern": {}, "use_dora": True},
            "model.layers.0.mamba.x_proj.0 has lora_A, lora_B, not lora_A, lora_B, lora_mag",
        ),
    ):
        edit(tmp_path, **settings)
        with pytest.raises(HymbaError) as caught:
            read_peft(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / WEIGHTS}: {message}")
    save_file({"base_model.model.lm_head.lora_embedding_A": np.ones((3, 4))}, tmp_path / WEIGHTS)
    with pytest.raises(HymbaError, match="lora_embedding_A is no LoRA or DoRA of a linear map"):
        read_peft(tmp_path)


def test_other_shapes_and_another_base_are_refused(tmp_path):
    write(tmp_path / "adapter", "dora", targets=("x_proj",))
    other = Hymba(dataclasses.replace(MODEL, layers="2*W"), ComputeConfig(), nnx.Rngs(0))
    with pytest.raises(HymbaError, match=r"x_proj\.0 is no linear map of this model"):
        merge_peft(tmp_path / "adapter", other)
    other = Hymba(MODEL, ComputeConfig(), nnx.Rngs(1))
    with pytest.raises(HymbaError, match="belongs to another model than this one"):
        merge_peft(tmp_path / "adapter", other)
    shutil.copytree(GOLDEN / "peft-lora", tmp_path / "of peft")
    with pytest.raises(HymbaError, match="in_proj is no linear map of this model"):
        merge_peft(tmp_path / "of peft", other)
    tensors = {
        f"base_model.model.model.layers.0.mamba.out_proj.lora_{side}.weight": np.zeros(shape, "f")
        for side, shape in (("A", (3, 32)), ("B", (17, 3)))
    }
    save_file(tensors, tmp_path / "of peft" / WEIGHTS)
    with pytest.raises(HymbaError, match="out_proj maps 32 to 17 there, 32 to 16 here"):
        merge_peft(tmp_path / "of peft", other)


def test_a_base_that_computes_in_another_way_is_refused(tmp_path):
    """Though its parameters are the same."""
    write(tmp_path, "lora", targets=("x_proj",))
    attention = dataclasses.replace(MODEL.attention, rope_theta=5e5)
    other = dataclasses.replace(MODEL, attention=attention, norm_eps=1e-5)
    with pytest.raises(HymbaError) as caught:
        merge_peft(tmp_path, Hymba(other, ComputeConfig(), nnx.Rngs(0)))
    assert str(caught.value) == (
        f"{tmp_path}: was trained on a model that computes in another way "
        "(model.attention.rope_theta is 10000.0 there, 500000.0 here; model.norm_eps is 1e-06 "
        "there, 1e-05 here): name one with those values, or export the run with --merge"
    )
    same = dataclasses.replace(MODEL, max_positions=128, pad_token_id=1)
    merge_peft(tmp_path, Hymba(same, ComputeConfig(), nnx.Rngs(0)))
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"base_config": "{"})
    with pytest.raises(HymbaError, match=r"its base_config is broken .*: export it again"):
        merge_peft(tmp_path, make_base())


def test_the_chat_template_beside_an_adapter_is_used(tmp_path):
    base = byte_tokenizer()
    config = dataclasses.replace(MODEL, vocab_size=base.vocab_size)
    assert peft_tokenizer(tmp_path, base, config) is base
    base.save(tmp_path)
    assert peft_tokenizer(tmp_path, base, config) is base
    Tokenizer(byte_tokenizer().model, "<s>", "</s>", "{{ messages }}").save(tmp_path)
    assert peft_tokenizer(tmp_path, base, config).chat_template == "{{ messages }}"
    assert peft_tokenizer(tmp_path, Tokenizer.load(tmp_path), config).chat_template
    with pytest.raises(HymbaError, match=r"does not fit: its eos token is 2, model\.eos_token_id"):
        peft_tokenizer(tmp_path, base, dataclasses.replace(config, eos_token_id=7))
    other = build_tokenizer("bpe:262", ["the cat sat on the mat"])
    Tokenizer(other.model, other.bos, other.eos, "{{ messages }}").save(tmp_path)
    with pytest.raises(HymbaError, match="its tokenizer gives text other ids than that of the"):
        peft_tokenizer(tmp_path, base, config)


def test_an_adapter_is_merged_once(tmp_path):
    write(tmp_path / "adapter", "lora", targets=("value_proj",))
    merged = merge_peft(tmp_path / "adapter", make_base())
    with pytest.raises(
        HymbaError, match="adapter: belongs to another model than this one, or is m"
    ):
        merge_peft(tmp_path / "adapter", merged)


MAPS = {  # of linear maps of the shapes in `GOLDEN`: a model that has one, and their names
    "in_proj": (
        dataclasses.replace(MODEL, hidden_size=12, mlp_size=20),
        "moe.experts.0.gate_proj",
        ("mlp", "gate_proj"),
    ),
    "out_proj": (
        dataclasses.replace(
            MODEL,
            hidden_size=10,
            attention=AttentionConfig(num_heads=1, num_kv_heads=1, window=4),
            ssm=SSMConfig(state_size=3, dt_rank=2),
        ),
        "mamba.x_proj.0",
        ("mixer", "ssm", "x_proj"),
    ),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    slow_but(
        [("lora", "in_proj"), ("rslora", "out_proj"), ("dora", "out_proj")],
        ("lora", "in_proj"),
        ("dora", "out_proj"),
    ),
)
def test_an_adapter_of_peft_is_merged_into_a_directory(kind, name, tmp_path):
    """The adapter is that of `GOLDEN`, by the HF checkpoint's names of one map in a layer."""
    config, module, place = MAPS[name]
    golden = GOLDEN / f"peft-{kind}"
    base, expected = (
        load_file(golden / f"{which}.safetensors")[f"{name}.weight"].T
        for which in ("base", "merged")
    )
    params = params_of(Hymba(config, ComputeConfig(scan_layers=False), nnx.Rngs(0)))
    path = ("groups", 1, "blocks", 0, *place, "kernel")
    flat = flatten_dict(params)
    flat[path] = base
    graph = nnx.graphdef(Hymba(config, ComputeConfig(scan_layers=False), nnx.Rngs(0)))
    save_model(tmp_path / "base", nnx.merge(graph, unflatten_dict(flat)), byte_tokenizer())
    shutil.copytree(golden, tmp_path / "adapter")
    tensors = {
        tensor.replace(f".{name}.", f".model.layers.1.{module}."): array
        for tensor, array in load_file(golden / WEIGHTS).items()
        if f".{name}." in tensor
    }
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    merge = ExportConfig(
        str(tmp_path / "base"), str(tmp_path / "out"), merge_peft=str(tmp_path / "adapter")
    )
    export(merge)
    merged = flatten_dict(params_of(load_model(tmp_path / "out")))
    np.testing.assert_allclose(merged.pop(path), expected, rtol=0, atol=1e-6)
    for other, kernel in merged.items():
        np.testing.assert_array_equal(kernel, flat[other])


def test_a_directory_without_adapter(tmp_path):
    with pytest.raises(HymbaError, match="no PEFT adapter, adapter_config"):
        merge_peft(tmp_path, make_base())


def test_a_base_in_bfloat16_is_the_same_base(tmp_path):
    write(tmp_path, "lora", targets=("x_proj",))
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(make_base()))
    merged = merge_peft(tmp_path, nnx.merge(nnx.graphdef(make_base()), rounded))
    assert merged.groups[0].blocks[0].mixer.ssm.x_proj.kernel.dtype == jnp.bfloat16


def test_trained_parameters_of_the_base_are_not_left_out_silently(tmp_path):
    adapter = AdapterConfig(kind="lora", train=("A_log",))
    with pytest.raises(HymbaError, match="the run trained A_log of the model itself"):
        write_peft(tmp_path, {}, MODEL, adapter, scan_layers=True, base_model="")
