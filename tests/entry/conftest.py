import pytest
from entry.command import write_config


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the processes of these tests keep what they compiled."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "runs" / "mine"


@pytest.fixture
def config(tmp_path, output):
    return write_config(tmp_path, output)
