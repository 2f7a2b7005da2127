"""What a process knows of the others before it meets them, and what it says of one lost."""

import os
import socket
import subprocess

import pytest

from hymba_jax.errors import HymbaError
from hymba_jax.parallel import processes
from hymba_jax.parallel.processes import (
    DistributedConfig,
    disagreements,
    distributed_session,
    is_launched,
    require_agreement,
)
from hymba_jax.parallel.watchdog import explain, watcher_command

LAUNCHERS = ("SLURM_", "OMPI_", "MEGASCALE_", "TPU_WORKER_HOSTNAMES")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "host"}, "coordinator is 'host', not HOST:PORT"),
        ({"coordinator": "host:no"}, "coordinator is 'host:no', not HOST:PORT"),
        ({"coordinator": "host:99999"}, "coordinator is 'host:99999', not HOST:PORT"),
        ({"num_processes": 0}, "num_processes is 0, not at least 1"),
        ({"num_processes": 2, "process_id": 2}, "process_id is 2, not from 0 to 1"),
        ({"num_processes": 2, "process_id": -1}, "process_id is -1, not from 0 to 1"),
        ({"process_id": 1}, "process_id is 1, but num_processes is not given"),
        ({"start_timeout": 0}, "start_timeout is 0, not at least 1"),
    ],
)
def test_values_that_cannot_be_are_named(values, message):
    with pytest.raises(HymbaError, match=f"^distributed config: {message}$"):
        DistributedConfig(**values)


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # in a batch script, outside srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host0,host1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_COORDINATOR_ADDRESS": "host0"}, True),
    ],
)
def test_launchers_are_known_by_their_environment(monkeypatch, variables, several):
    for name in [name for name in processes.os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # as JAX does on a host without TPUs
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_launched() is several


def test_a_process_alone_asks_nobody(monkeypatch):
    monkeypatch.setattr(processes, "is_launched", lambda: False)
    monkeypatch.setattr(processes.jax.distributed, "initialize", None)  # not to be called
    with distributed_session(DistributedConfig(), "runs/mine"):
        pass
    with distributed_session(
        DistributedConfig("host:1", num_processes=1, process_id=0), "runs/mine"
    ):
        pass


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        config = DistributedConfig(f"127.0.0.1:{port}", num_processes=2, process_id=0)
        with (
            pytest.raises(HymbaError, match=f"cannot listen on port {port} .*: choose another$"),
            distributed_session(config, "runs/mine"),
        ):
            pass


@pytest.mark.parametrize(
    "config",
    [DistributedConfig("127.0.0.1:4000"), DistributedConfig(num_processes=2, process_id=0)],
    ids=["an address", "an id"],
)
def test_one_of_three_is_too_little(monkeypatch, config):
    monkeypatch.setattr(processes, "watch_stderr", lambda *_: None)
    with (
        pytest.raises(HymbaError, match=r"cannot connect the processes .*: give distributed.coord"),
        distributed_session(config, "runs/mine"),
    ):
        pass


def test_processes_meet_at_the_end_before_a_collective_that_would_give_up(monkeypatch):
    waited = []
    monkeypatch.setattr(processes, "watch_stderr", lambda *_: None)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **__: None)
    for name in ("wait_for_all", "barrier"):
        monkeypatch.setattr(processes, name, lambda _, name=name: waited.append(name))
    with distributed_session(DistributedConfig("host:1", num_processes=2, process_id=1)):
        pass
    assert waited == ["wait_for_all", "barrier"]


# Taken down from JAX 0.12.
REGISTER = "\n\nRPC: /xla.coordination.CoordinationService/RegisterTask"
LATE = ". absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded" + REGISTER
TWICE = (
    ". absl::Status: ALREADY_EXISTS: Aborted connect attempt as there is a request from a newer "
    "incarnation." + REGISTER
)
SILENT = (
    ". absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
    "{who}\nThe tasks have crashed. Check the task logs for an earlier error"
)
FIRST = ". absl::Status: UNAVAILABLE: Failed to send RPC to coordination service. Either the leader"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (LATE, "not all processes of the run connected at host:1 within 9 s: "),
        (TWICE, "another process has connected at host:1 with this process's id: "),
        (SILENT.format(who="1"), "{run}: lost process 1, which "),
        (SILENT.format(who="1\n3"), "{run}: lost process 1, 3, which "),
        (FIRST, "{run}: lost process 0, which "),
        (". absl::Status: INTERNAL: something new", "{run}: lost another process, which "),
    ],
)
def test_what_jax_says_is_one_line(tmp_path, words, line):
    said = explain(words, str(tmp_path), " at host:1", 9)
    assert said.startswith("error: " + line.format(run=tmp_path))
    assert "\n" not in said


def test_it_resumes_from_the_newest_step(tmp_path):
    assert explain(FIRST, str(tmp_path), "", 9).endswith(
        "with the same command to start from scratch"
    )
    for name in ("8", "10", "12.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert explain(FIRST, str(tmp_path), "", 9).endswith("to resume from step 10")


def test_a_command_that_is_no_run_resumes_nothing():
    said = explain(FIRST, "", "", 9)
    assert said.startswith("error: lost process 0, which ")
    assert said.endswith("then start all processes again with the same command")


def test_the_watcher_runs_nothing_of_the_working_directory(tmp_path):
    for name in ("subprocess", "re", "sitecustomize", "hymba_jax"):
        (tmp_path / f"{name}.py").write_text('open("run", "w").write("")')
    ended = subprocess.run(
        watcher_command(str(tmp_path), "", 9),
        input=b"any words\n",
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True,
    )
    assert (ended.stdout, ended.stderr) == (b"", b"any words\n")
    assert not (tmp_path / "run").exists()


def test_the_watcher_runs_where_the_package_is_not_installed(tmp_path):
    """Without site-packages, where a checkout or an installation made it known to Python."""
    interpreter, *arguments = watcher_command(str(tmp_path), "", 9)
    command = [interpreter, "-S", *arguments]
    ended = subprocess.run(command, input=b"any words\n", capture_output=True, check=True)
    assert (ended.stdout, ended.stderr) == (b"", b"any words\n")


def test_what_processes_disagree_on_is_named_with_who_has_what():
    same = {"seed": 0, "model.layers": "G"}
    assert [*disagreements([same, dict(same), dict(same)])] == []
    found = [{**same, "rate": 0.1}, {**same, "rate": 1.0}, {"seed": 0, "rate": 0.1}]
    assert [*disagreements(found)] == [
        'model.layers is "G" in processes 0, 1 and null in process 2',
        "rate is 0.1 in processes 0, 2 and 1.0 in process 1",
    ]


def test_a_process_alone_agrees_with_itself():
    require_agreement({"rate": 0.1})
