"""Options of adapters, in files and on command lines."""

import pytest

from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.errors import HymbaError
from hymba_jax.training.arguments import parse_run


def test_lists_of_strings_are_in_files_and_commands(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[adapter]\nkind = "dora"\ntargets = ["query_proj", "mlp"]\n')
    run = RunConfig.from_toml(path)
    assert run.adapter == AdapterConfig(kind="dora", targets=("query_proj", "mlp"))
    path.write_text(run.to_toml())
    assert RunConfig.from_toml(path) == run
    parsed, _ = parse_run(["--config", str(path), "--adapter.train", "A_log", "D"], "train.py")
    assert parsed.adapter.train == ("A_log", "D")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lora", "rank": 0}, "rank is 0, below 1: an update of rank 0 is none"),
        ({"rank": 8}, "rank is 8, and kind none does not use it: name a kind"),
        ({"kind": "lora", "targets": []}, "targets is empty: name a projection"),
        ({"kind": "lora", "dropout": 1.0}, "dropout is 1.0, above 0.99: hardly any input"),
    ],
)
def test_adapters_that_are_none_are_refused(options, message):
    with pytest.raises(HymbaError) as caught:
        AdapterConfig(**options)
    assert str(caught.value).startswith(f"adapter config: {message}")


def test_alpha_is_over_the_rank_or_its_root():
    assert AdapterConfig("dora", rank=16, alpha=32.0).scale == 2
    assert AdapterConfig("rslora", rank=16, alpha=32.0).scale == 8
