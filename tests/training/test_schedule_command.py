import numpy as np
import pytest

from hymba_jax import cli
from hymba_jax.config.run import RunConfig
from hymba_jax.training.schedule_command import bars, schedule_curves

RECIPE = """
[data.sources.web]
path = "web"
weight = 3

[data.sources.books]
path = "books"

[training]
batch_size = 4
learning_rate = 0.1
min_learning_rate = 0.02
warmup_steps = 0

[[stages]]
name = "stable"
steps = 6
schedule = "constant"
sequence_length = 8

[[stages]]
name = "decay"
steps = 4
schedule = "linear"
sequence_length = 16
sources.books.weight = 1
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_curves_are_what_each_step_has(recipe):
    """At 14 x 32 tokens: one point a step of the first stage, two of the second."""
    curves = schedule_curves(RunConfig.from_toml(recipe), 14)
    assert curves.tokens.tolist() == [32 * i for i in range(14)]
    decay = [0.08, 0.08, 0.06, 0.06, 0.04, 0.04, 0.02, 0.02]
    np.testing.assert_allclose(curves.learning_rate, [0.1] * 6 + decay, rtol=1e-6)
    assert curves.sequence_length.tolist() == [8] * 6 + [16] * 8
    assert curves.shares["web"].tolist() == [0.75] * 6 + [0.0] * 8
    assert curves.shares["books"].tolist() == [0.25] * 6 + [1.0] * 8


def test_bars_are_as_high_as_their_values():
    assert bars(np.array([0.0, 0.5, 1.0])) == " ▄█"


def test_the_command_prints_and_draws(recipe, tmp_path, capsys):
    image = tmp_path / "plots" / "s[:x:2].png"  # printed as it is
    recipe.write_text(
        recipe.read_text().replace("length = 16", "length = 16384\nmax_positions = 16384")
    )
    cli.main(["schedule", "--config", str(recipe), "--image", str(image)])
    printed = capsys.readouterr().out
    for words in (
        "stage stable: steps 1 to 6",
        "0.1 to 0.02, linear, decay 4",
        "web 0.75, books 0.25",
        "learning rate, 0.02 to 0.1\n",
        "sequence length, 8 to 16,384\n",
    ):
        assert words in printed
    assert "262,336 tokens" in printed
    assert f"{image}\n" in printed
    assert image.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in image.parent.iterdir()] == [image.name]
    with pytest.raises(SystemExit, match=r"an image ends in \.png"):
        cli.main(["schedule", "--config", str(recipe), "--image", str(tmp_path / "it.xyz")])
    assert capsys.readouterr().out.startswith("stage stable")
