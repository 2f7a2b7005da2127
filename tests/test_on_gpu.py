"""`benchmarks/on_gpu.py`, which runs once and unattended: nothing that goes wrong in a step may
cost more than that step."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import on_gpu

    return on_gpu


# What steps do in the real ones' place, with a file for rows and one for a process's id.
ROW = 'open(rows, \'a\').write(\'{"case": "one", "passed": true}\\n\');'
FAKES = {
    "first": ROW,
    "crashes": ROW + "import os; print('about to abort', flush=True); os.abort()",
    "fails": ROW + "print('it is wrong'); sys.exit(1)",
    "hangs": ROW
    + "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    + "child = subprocess.Popen(['sleep', '600']); open(pid, 'w').write(str(child.pid));"
    + "print('hanging', flush=True); child.wait()",
    "half a row": ROW + "open(rows, 'a').write('{\"case\":')",
    "last": ROW,
}


@pytest.fixture
def run(on_gpu, tmp_path):
    """Runs fake steps; gives their results by name, as the file has them."""

    def run(*names, limits=None, seconds=60.0):
        steps = [on_gpu.Step(name, (limits or {}).get(name, 30), name) for name in names]
        file = tmp_path / "results.json"

        def command(step, limit, rows, profile):
            arguments = f"import sys; rows, pid = {str(rows)!r}, {str(tmp_path / 'pid')!r};"
            return [sys.executable, "-c", arguments + FAKES[step.function]]

        results = on_gpu.run_steps(steps, command, os.environ, seconds, file)
        written = json.loads(file.read_text())["steps"]
        assert written == results
        return {result["step"]: result for result in written}

    return run


def test_steps_that_go_wrong_leave_the_others_alone(run, capsys):
    results = run("first", "crashes", "fails", "half a row", "last")
    assert {name: result["status"] for name, result in results.items()} == {
        "first": "passed",
        "crashes": "failed",
        "fails": "failed",
        "half a row": "passed",
        "last": "passed",
    }
    assert results["crashes"]["exit"] == -signal.SIGABRT
    assert "about to abort" in results["crashes"]["output"]
    assert "it is wrong" in results["fails"]["output"]
    assert "output" not in results["last"]
    for result in results.values():  # what was found before it went wrong, and whole
        assert [row["case"] for row in result["rows"]] == ["one"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        *("first", "crashes", "fails", "half", "last")
    ]


def test_a_step_that_hangs_is_killed_with_its_children(run, tmp_path):
    results = run("first", "hangs", "last", limits={"hangs": 6})
    assert [result["status"] for result in results.values()] == ["passed", "timed out", "passed"]
    assert "hanging" in results["hangs"]["output"]
    assert [row["case"] for row in results["hangs"]["rows"]] == ["one"]
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_what_the_time_does_not_reach_is_skipped(run, on_gpu):
    results = run("first", "last", seconds=on_gpu.MIN_STEP_SECONDS - 1)
    assert [result["status"] for result in results.values()] == ["skipped", "skipped"]
    assert results["last"]["reason"] == "no time is left"


def test_without_the_first_step_none_is_begun(run):
    results = run("fails", "last")
    assert [result["status"] for result in results.values()] == ["failed", "skipped"]
    assert results["last"]["reason"] == "the step fails did not pass"


def test_ending_the_script_ends_its_step(tmp_path):
    """Whatever it has started would keep the GPU from what comes next."""
    pid = tmp_path / "pid"
    script = (
        f"import signal, sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import _isolated;"
        "from pathlib import Path; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        f"_isolated.run_isolated(['sh', '-c', 'echo $$ > {pid}; sleep 600'],"
        f" limit=60, log=Path({str(tmp_path / 'log')!r}), environment={{}})"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        while not (pid.exists() and pid.read_text().strip()):
            time.sleep(0.05)
        process.terminate()
        assert process.wait() == 143
    assert not is_running(int(pid.read_text()))


def is_running(pid):
    """Whether there is such a process, other than as an entry that nobody has asked for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("installed", ["0.11.2", "0.13.0", "0.120.0"])
def test_another_jax_is_refused_at_once(on_gpu, monkeypatch, tmp_path, installed):
    monkeypatch.setattr(on_gpu, "version", lambda _: installed)
    file = tmp_path / "folder" / "results.json"
    with pytest.raises(SystemExit) as refused:
        on_gpu.main(["--json", str(file)])
    assert refused.value.code == (
        f"on_gpu.py: JAX 0.12 is needed, {installed} is installed: "
        "put the folder of its wheels on PYTHONPATH"
    )
    assert not file.parent.exists()


def test_only_the_steps_that_are_named(on_gpu, monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # it is this process's
    monkeypatch.setattr(on_gpu, "run_steps", lambda steps, *_: taken.extend(steps) or [])
    common = ["--json", str(tmp_path / "results.json"), "--cache", str(tmp_path / "cache")]
    assert on_gpu.main([*common, "--only", "decode 128", "train 1.5B"]) == 0
    assert [step.name for step in taken] == ["train 1.5B", "decode 128"]
    assert all(step in on_gpu.STEPS for step in taken)  # with their own limits
    with pytest.raises(SystemExit):
        on_gpu.main([*common, "--only", "decode 7"])


@pytest.mark.parametrize(("size", "told"), [(1000, "packed as"), (17 * 2**20, "too large to pack")])
def test_the_cache_is_packed_if_it_is_small(on_gpu, tmp_path, size, told):
    cache, file = tmp_path / "cache", tmp_path / "cache.tar"
    cache.mkdir()
    (cache / "program").write_bytes(bytes(size))
    assert told in on_gpu.pack(cache, file)
    assert file.exists() == (told == "packed as")


@pytest.fixture
def recorder(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from _gpu_step import Recorder

    return Recorder(tmp_path / "rows", tmp_path / "profile", dry_run=True)


def test_a_case_that_fails_does_not_stop_the_next(recorder, tmp_path, capsys):
    with recorder.case("right") as row:
        row["ms"] = 1.5
    assert not recorder.failed
    with recorder.case("raises") as row:
        row["ms"] = 2.5
        raise MemoryError("needs 90.0 GB\nmore")
    with recorder.case("not a number") as row:
        row["ms"] = math.nan
    with recorder.case("right again"):
        pass
    assert recorder.failed
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["case"], row["passed"]) for row in rows] == [
        ("right", True),
        ("raises", False),
        ("not a number", False),
        ("right again", True),
    ]
    assert rows[1]["error"] == "MemoryError: needs 90.0 GB"
    assert rows[1]["ms"] == 2.5
    assert rows[2]["error"] == "FloatingPointError: not finite: ms"
    assert "in test_a_case_that_fails" in capsys.readouterr().err  # the whole traceback


@pytest.mark.slow
def test_dry_run_takes_every_step(on_gpu, tmp_path):
    file = tmp_path / "results.json"
    command = [sys.executable, BENCHMARKS / "on_gpu.py", "--dry-run", "--minutes", "60"]
    subprocess.run([*command, "--json", file, "--cache", tmp_path / "cache"], check=True)
    results = json.loads(file.read_text())["steps"]
    assert [result["step"] for result in results] == [step.name for step in on_gpu.STEPS]
    rows = {result["step"]: {row["case"]: row for row in result["rows"]} for result in results}
    for result in results:
        assert result["status"] == "passed"
        for row in result["rows"]:
            assert row["passed"]
            assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    speeds = [step.name for step in on_gpu.STEPS if "_gpu_speed" in step.function]
    for name in speeds:
        assert rows[name]["profile"]["busiest"]
        assert file.with_name(f"{name.replace(' ', '-')}.xplane.pb.gz").stat().st_size > 0
    for name in ("train 125M", "train 1.5B"):
        assert rows[name]["step"]["tokens_per_second"] > 0
        assert rows[name]["step"]["last loss"] != rows[name]["step"]["loss"]
    for name in ("decode 1", "decode 128"):
        assert rows[name]["decode"]["tokens_per_second"] > 0
        assert rows[name]["decode"]["stopped"] == 0
    for name in ("conforming scan", "conforming attention"):
        assert all("implementation" in row for row in rows[name].values())
    assert any((tmp_path / "cache").iterdir())
