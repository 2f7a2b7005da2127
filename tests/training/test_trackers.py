"""Trackers: what each tool gets, and what happens if one fails."""

import json
import struct
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
from tensorboardX.proto.event_pb2 import Event

from hymba_jax.config.run import RunConfig
from hymba_jax.config.tracking import TrackingConfig
from hymba_jax.errors import HymbaError
from hymba_jax.training.git_state import git_state
from hymba_jax.training.metrics import MetricsWriter, last_step
from hymba_jax.training.run_start import RunStart, record_start
from hymba_jax.training.tensorboard import TensorBoard
from hymba_jax.training.trackers import check_trackers, make_trackers


class FakeTool(types.ModuleType):
    """The calls of wandb and Trackio that are used, with what they were given."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin="fake")
        self.runs, self.lines, self.fails_at, self.finished = [], [], None, 0

    def Settings(self, **options):
        return options

    def init(self, **options):
        if self.fails_at == 0:
            raise ConnectionError("no network\nand more about it")
        self.runs.append(options)
        return self

    def log(self, metrics, step):
        if step == self.fails_at:
            raise ConnectionError("no network")
        self.lines.append((step, metrics["loss"]))

    def finish(self):
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def tool(request, monkeypatch):
    tool = FakeTool(request.param)
    monkeypatch.setitem(sys.modules, request.param, tool)
    return tool


def track(directory, tool, steps, resumes_from=None, said=None):
    """Runs these steps, or resumes a run to do so, as the loop does."""
    config = RunConfig(output=str(directory), tracking=TrackingConfig(**{tool.__name__: "mine"}))
    check_trackers(config.tracking)
    start = record_start(
        config,
        directory,
        resumes_from or 0,
        last_step(directory),
        is_resumed=resumes_from is not None,
    )
    said = [] if said is None else said
    with MetricsWriter(start, said.append, make_trackers(config.tracking)) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step})


def test_a_tool_gets_config_git_and_metrics_and_each_step_once(tool, tmp_path):
    """Though the run is resumed twice from earlier steps; a run from scratch is another one."""
    track(tmp_path, tool, range(1, 10))
    track(tmp_path, tool, range(4, 6), resumes_from=3)
    track(tmp_path, tool, range(5, 13), resumes_from=4)
    assert tool.lines == [(step, 1 / step) for step in range(1, 13)]
    ids = [run["name"] for run in tool.runs]
    assert len(set(ids)) == 1
    assert ids[0].startswith(tmp_path.name)
    first = tool.runs[0]
    assert first["project"] == "mine"
    assert first["resume"] == "allow"
    assert first["config"]["training"]["steps"] == 1000
    assert set(first["config"]["git"]) == {"commit", "dirty"}
    json.dumps(first["config"])
    assert tool.finished == 3
    track(tmp_path, tool, [1])
    assert tool.runs[-1]["name"] != ids[0]
    assert tool.lines[-1] == (1, 1.0)


def test_a_tool_that_fails_is_reported_once_and_training_continues(tool, tmp_path):
    tool.fails_at, said = 3, []
    track(tmp_path, tool, range(1, 6), said=said)
    name = tool.__name__
    assert said == [f"tracking.{name} failed (no network): left out until the run is started again"]
    assert tool.lines == [(1, 1.0), (2, 0.5)]
    assert last_step(tmp_path) == 5


def test_a_tool_that_cannot_start_stops_a_new_run_but_not_a_resumed_one(tool, tmp_path):
    tool.fails_at, said = 0, []
    with pytest.raises(HymbaError) as caught:
        track(tmp_path, tool, [1])
    name = tool.__name__
    assert str(caught.value) == (
        f"tracking.{name}: cannot start (no network): fix it, or leave tracking.{name} out"
    )
    track(tmp_path, tool, [1], resumes_from=0, said=said)
    assert len(said) == 1
    assert last_step(tmp_path) == 1


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_tool_that_is_not_installed_is_refused(name, monkeypatch):
    """A folder of its name, which wandb writes, is not it."""
    monkeypatch.setattr(
        "hymba_jax.training.trackers.find_spec", lambda name: ModuleSpec(name, None)
    )
    with pytest.raises(HymbaError, match=rf"tracking\.{name}: .*pip install 'hymba_jax\[{name}\]'"):
        check_trackers(TrackingConfig(**{name: name == "tensorboard" or "mine"}))


def test_a_killed_start_is_no_obstacle(tool, tmp_path):
    track(tmp_path, tool, [1])
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"time": "20')
    track(tmp_path, tool, [2], resumes_from=1)
    assert tool.runs[0]["name"] == tool.runs[1]["name"]
    *_, line = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1


def events(directory):
    """All of what TensorBoard would read."""
    for file in (directory / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:  # records of: length, its checksum, bytes, their checksum
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_shows_config_git_and_the_metrics_of_the_last_run(tmp_path):
    for step in (0, 1):
        start = RunStart(tmp_path, step, config={"seed": 7}, git={"commit": "abc"})
        with MetricsWriter(start, trackers={"tensorboard": TensorBoard()}) as writer:
            writer.write(step + 1, {"loss": 1.5, "needle/accuracy": step})
            assert {(step + 1, "loss", 1.5), (step + 1, "needle/accuracy", step)} <= {
                (event.step, value.tag, value.simple_value)
                for event in events(tmp_path)
                for value in event.summary.value
            }
    assert {event.step for event in events(tmp_path) if event.session_log.status} == {1, 2}
    texts = [
        value.tensor.string_val[0].decode()
        for event in events(tmp_path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "text"
    ]
    assert len(texts) == 4
    assert sum('"seed": 7' in text for text in texts) == 2
    assert sum('"commit": "abc"' in text for text in texts) == 2


def test_the_state_of_a_repository_is_its_commit_and_whether_tracked_files_changed(tmp_path):
    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ("git", "-C", tmp_path, *author, *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) is None
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / "run").write_text("untracked")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "code.py").write_text("2")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
