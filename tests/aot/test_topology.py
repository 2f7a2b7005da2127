"""Names of slices, and the facts of their chips."""

import pytest

from hymba_jax.aot import topology
from hymba_jax.aot.estimate import Work
from hymba_jax.aot.topology import CHIPS, parse_topology
from hymba_jax.errors import HymbaError


@pytest.mark.parametrize("name", ["v5e:16x16", "v5p:4x4x4", "v6e:4x4", "h100:1", "h100:8"])
def test_names(name):
    assert parse_topology(name) == (name, CHIPS[name.split(":")[0]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "topology is 'v5e', not a chip and a shape such as v5e:16x16"),
        ("v5e:", "not a chip and a shape"),
        ("v5e:0x4", "not a chip and a shape"),
        ("v5e:4x", "not a chip and a shape"),
        ("v9:2x2", "topology v9:2x2: there is no 'v9', only v5e, v5p, v6e, h100"),
        ("h100:16", "topology h100:16: only the GPUs of one host are supported, h100:1 to h100:8"),
        ("h100:2x4", "only the GPUs of one host"),
        ("v5e:2x2x2x2", "not a chip and a shape"),
        ("v5e:99999x99999", "topology 'v5e:99999x99999': no slice has more than 16384 chips"),
        ("h100:" + "9" * 5000, "no slice has more than 16384 chips"),
    ],
)
def test_names_of_nothing(name, message):
    with pytest.raises(HymbaError, match=r"^topology") as caught:
        parse_topology(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("h100:8", "cuda13")])
def test_a_compiler_that_is_not_installed(monkeypatch, name, extra):
    def missing(module):
        raise ModuleNotFoundError(module)

    monkeypatch.setattr(topology, "import_module", missing)
    with pytest.raises(HymbaError) as caught:
        parse_topology(name).devices()
    assert str(caught.value) == (
        f"{name}: its compiler is not installed, pip install -e '.[{extra}]' in the repository"
    )


def test_every_chip_has_its_peak():
    """From the data sheets, in TFLOP/s."""
    peaks = {name: chip.peak_flops / 1e12 for name, chip in CHIPS.items()}
    assert peaks == {"v5e": 197, "v5p": 459, "v6e": 918, "h100": 989}


def test_the_time_of_each_kind_of_work():
    """One second of each on a v5e."""
    seconds = Work(flops=197e12, hbm_bytes=819e9, collective_bytes=200e9).seconds(CHIPS["v5e"])
    assert seconds == {"arithmetic": 1, "memory": 1, "interconnect": 1}
