"""What cannot be converted: one clear line, and nothing is left behind."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from convert.hf import (
    convert,
    golden_config,
    golden_weights,
    read_hf,
    write_hf,
)
from golden_cases import GOLDEN

from hymba_jax import cli
from hymba_jax.checkpoint.checkpoints import silence_orbax
from hymba_jax.checkpoint.load import load_model
from hymba_jax.convert.hf_config import config_from_hf
from hymba_jax.convert.mapping import EMBEDDING
from hymba_jax.convert.tensor_file import TensorFile
from hymba_jax.convert.verify import read_expected
from hymba_jax.errors import HymbaError

silence_orbax()

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def complete_hf(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("complete_hf") / "hf")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The same in two files."""
    directory = write_hf(tmp_path_factory.mktemp("sharded") / "hf")
    (directory / WHOLE).unlink()
    weights = sorted(golden_weights().items())
    half = len(weights) // 2
    places = {}
    for file, part in ((ONE, weights[:half]), (TWO, weights[half:])):
        safetensors.numpy.save_file(dict(part), directory / file, {"format": "pt"})
        places |= dict.fromkeys(dict(part), file)
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    return directory


@pytest.fixture(scope="module")
def native(complete_hf, tmp_path_factory):
    return convert(complete_hf, tmp_path_factory.mktemp("native") / "native")


def refusal(tmp_path, original, damage):
    """The line that a damaged copy is refused with; nothing is written."""
    source = shutil.copytree(original, tmp_path / "source")
    damage(source)
    with pytest.raises(HymbaError) as caught:
        convert(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    message = str(caught.value)
    assert "\n" not in message
    assert message.count(str(source)) == 1
    return message


def truncate(name, size):
    return lambda directory: os.truncate(directory / name, size)


def overwrite(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def remove(name):
    return lambda directory: (directory / name).unlink()


def edit_config(**changes):
    def damage(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def edit_index(change):
    def damage(directory):
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def edit_weights(change):
    def damage(directory):
        weights = safetensors.numpy.load_file(directory / WHOLE)
        change(weights)
        safetensors.numpy.save_file(weights, directory / WHOLE)

    return damage


def wrap(form):
    def change(weights):
        renamed = {form.format(name): array for name, array in weights.items()}
        weights.clear()
        weights.update(renamed)

    return change


def fifo(name):
    def damage(directory):
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return damage


def device(name):
    def damage(directory):
        (directory / name).unlink()
        (directory / name).symlink_to("/dev/zero")

    return damage


BYTES = b"12345678"


def header(entries, data=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate(WHOLE, 1_000_000), "truncated, damaged or not a safetensors file"),
        (truncate(WHOLE, 100), "truncated, damaged or not a safetensors file"),
        (overwrite(WHOLE, b""), "truncated, damaged or not a safetensors file"),
        (fifo(WHOLE), "is a FIFO, not a regular file"),
        (device(WHOLE), "is a device, not a regular file"),
        (remove(WHOLE), "no weights found"),
        (remove("config.json"), "no checkpoint found"),
        (overwrite("config.json", b"{"), "config.json: broken JSON"),
        (overwrite("config.json", b"[]"), "config.json: not a JSON object"),
        (overwrite("config.json", b"[" * 100_000), "config.json: broken JSON (nested too deeply)"),
        (edit_weights(wrap("module.{}")), "of DataParallel or DistributedDataParallel in"),
        (edit_weights(wrap("_orig_mod.{}")), "of torch.compile in their names: save the unwrapped"),
        (edit_config(model_type="llama"), "model_type is 'llama', and only 'hymba' is supported"),
        (edit_config(num_hidden_layers="ten"), "num_hidden_layers is 'ten', not an integer"),
        (edit_config(mamba_d_state=8), "mamba.A_log.0 has shape (96, 16), not (96, 8)"),
        (
            edit_config(num_hidden_layers=9, kv_reuse_group=[[1, 2]], global_attn_idx=[0, 5]),
            "model.layers.9.mamba.D.0 is",
        ),
        (edit_config(global_attn_idx=[0, 10]), "global_attn_idx names layers outside 0..9: [10]"),
    ],
)
def test_one_file(complete_hf, tmp_path, damage, message):
    assert message in refusal(tmp_path, complete_hf, damage)


@pytest.mark.parametrize(
    "content",
    [
        b"12345",
        b"\xff" * 16,
        (3).to_bytes(8, "little") + b"{}}",
        header([1]),
        header(b'{"a": {}, "a": {}}'),
        header({"a": 3}),
        header({"a": entry(shape=[-1])}, BYTES),
        header({"a": entry(shape=[3])}, BYTES),
        header({"a": entry()}, b"123456789"),
        # A dtype in another case must not let the second tensor overlap the first.
        header({"a": entry("float32"), "b": entry("float32", offsets=(4, 8))}, BYTES),
        header({"a": entry("f32")}, BYTES),
        header({"a": entry("F99")}, BYTES),
        header({"a": entry(), "b": entry()}, BYTES),
        header({"a": entry(shape=[1], offsets=(4, 8))}, BYTES),
        header({"a": entry(), "b": entry(shape=[1], offsets=(4, 8))}, BYTES),
        header({"a": entry(shape=[1], offsets=(4, 0))}, BYTES),
        header({"a": entry(shape=[2.0])}, BYTES),
        header({"a": entry(shape=[2**62, 4])}, BYTES),
        header({"a": entry(shape=[0, 2**64], offsets=(0, 0))}),
        header({"a": entry(offsets=(0, 8, 9))}, BYTES),
        header({"a": entry(offsets=(0.0, 8.0))}, BYTES),
        header({"a": entry(offsets=("0", "8"))}, BYTES),
        header({"a": entry("F4", shape=[1], offsets=(0, 1))}, b"1"),
        header({"__metadata__": {"format": 5}}),
        header({"__metadata__": [1]}),
        header(b'{"a":' * 100_000),
        header(b"{}".ljust(100_000_001)),
    ],
    ids=range(27),
)
def test_headers_that_the_format_forbids(content, tmp_path):
    (tmp_path / WHOLE).write_bytes(content)
    with pytest.raises(HymbaError, match=r"truncated, damaged or not a safetensors file \(.*\)"):
        TensorFile(tmp_path / WHOLE)


def test_names_with_control_characters_do_not_reach_the_terminal(complete_hf, tmp_path, capsys):
    evil = "a\x1b]0;owned\x07\r\nb"
    source = shutil.copytree(complete_hf, tmp_path / "source")
    edit_weights(lambda weights: weights.update({evil: np.zeros(3, np.float32)}))(source)
    for command in (cli.convert, lambda args: cli.inspect(args[:1], "hymba inspect")):
        with pytest.raises(SystemExit) as caught:
            command([str(source), str(tmp_path / "target")])
        text = caught.value.code + capsys.readouterr().out
        assert r"a\x1b]0;owned\x07\r\nb is not part of this model" in caught.value.code
        assert not {"\x1b", "\x07", "\r"} & {*text}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(TWO), f"{TWO} is missing"),
        (fifo(TWO), f"{TWO}: is a FIFO, not a regular file"),
        (truncate(TWO, 1000), "truncated"),
        (
            edit_index(lambda m: m.update({EMBEDDING: "gone.safetensors"})),
            "gone.safetensors is mis",
        ),
        (
            edit_index(lambda m: m.update({EMBEDDING: "../x.safetensors"})),
            "'../x.safetensors' is no",
        ),
        (
            edit_index(lambda m: m.update({EMBEDDING: "/etc/passwd"})),
            "'/etc/passwd' is not a file in",
        ),
        (edit_index(lambda m: m.update({EMBEDDING: TWO})), f"{EMBEDDING} is not in {TWO}"),
        (edit_index(lambda m: m.pop(EMBEDDING)), f"{EMBEDDING} is missing from the index"),
        (edit_index(lambda m: m.update({"more": TWO})), f"more is not in {TWO}"),
        (overwrite(INDEX, b'{"weight_map": 3}'), "has no weight_map from tensors to files"),
        (
            lambda directory: shutil.copyfile(directory / TWO, directory / ONE),
            "is in 2 files",
        ),
    ],
)
def test_many_files(sharded, tmp_path, damage, message):
    assert message in refusal(tmp_path, sharded, damage)


def test_many_files_are_read(sharded, complete_hf, tmp_path):
    native = convert(sharded, tmp_path / "native")
    back = read_hf(convert(native, tmp_path / "back"))
    assert {name: a.tobytes() for name, a in back.items()} == {
        name: a.tobytes() for name, a in read_hf(complete_hf).items()
    }


def test_every_problem_is_listed_at_once(complete_hf, tmp_path):
    def change(weights):
        del weights["model.final_layernorm.weight"]
        weights["model.layers.3.mamba.D.0"] = np.zeros(3, np.float32)
        weights["model.layers.4.mamba.D.0"] = np.zeros(96, np.int64)
        weights["lm_head.bias"] = np.zeros(3, np.float32)

    message = refusal(tmp_path, complete_hf, edit_weights(change))
    for words in (
        "model.final_layernorm.weight is missing",
        "lm_head.bias is not part of this model",
        "model.layers.3.mamba.D.0 has shape (3,), not (96,)",
        "model.layers.4.mamba.D.0 has dtype I64, not bfloat16, float16 or float32",
    ):
        assert words in message


def lose_an_array(directory):
    (directory / "params" / "meta_tokens" / "0.0").unlink()


def widen(directory):
    path = directory / "config.toml"
    path.write_text(path.read_text().replace("mlp_size = 48", "mlp_size = 50"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: shutil.rmtree(directory / "params"), "no checkpoint; there is none"),
        (lose_an_array, "not parameters that can be read"),
        (truncate("params/embedding/0.0", 1000), "not parameters that can be read"),
        (truncate("params/embedding/0.0", 10**6), ", in embedding/0.0)"),
        (fifo("params/embedding/0.0"), "0.0: is a FIFO, not a regular file"),
        (overwrite("params/embedding/.zarray", b"[" * 100_000), "not parameters that can be read"),
        (remove("params/_METADATA"), "source: damaged, it has no params/_METADATA: restore it"),
        (widen, "mlp.up_proj.kernel has shape (48, 48), not (48, 50); "),
        (overwrite("config.toml", b"a = "), "not a TOML file"),
    ],
)
def test_native(native, tmp_path, damage, message):
    assert message in refusal(tmp_path, native, damage)


class TestTarget:
    def test_an_existing_one_is_refused(self, complete_hf, native, tmp_path):
        (tmp_path / "target").mkdir()
        with pytest.raises(HymbaError, match="exists already, choose another target or --overwr"):
            convert(complete_hf, tmp_path / "target")

    def test_a_conversion_is_overwritten_if_asked_for(self, complete_hf, native, tmp_path):
        back = convert(native, tmp_path / "target")
        convert(complete_hf, back, overwrite=True)
        assert load_model(back).embedding.shape == (89, 48)
        assert not (back / WHOLE).exists()
        assert [path.name for path in tmp_path.iterdir()] == ["target"]

    @pytest.mark.parametrize(
        "other", ["dear.txt", "checkpoints/60/params/x", "params/more", "notes.py", "link"]
    )
    def test_other_files_are_never_overwritten(self, other, complete_hf, native, tmp_path):
        """A training run in the directory among them."""
        target = shutil.copytree(native, tmp_path / "target")
        (target / other).parent.mkdir(parents=True, exist_ok=True)
        if other == "link":
            (target / other).symlink_to(tmp_path)
        else:
            (target / other).write_text("mine")
        with pytest.raises(HymbaError, match=f"target: holds {other}, not written by a conversion"):
            convert(complete_hf, target, overwrite=True)
        assert (target / other).exists()

    def test_what_was_written_again_is_not_overwritten(self, complete_hf, native, tmp_path):
        """By a fine-tuned model that was saved into it, say."""
        target = shutil.copytree(native, tmp_path / "target")
        file = target / "config.toml"
        file.write_text(file.read_text())
        with pytest.raises(HymbaError, match=r"target: holds config\.toml, not"):
            convert(complete_hf, target, overwrite=True)

    def test_permissions_stay(self, native, tmp_path):
        target = shutil.copytree(native, tmp_path / "target")
        target.chmod(0o700)
        convert(native, target, overwrite=True)
        assert target.stat().st_mode & 0o777 == 0o700

    def test_an_hf_checkpoint_of_others_is_never_overwritten(self, complete_hf, native, tmp_path):
        target = shutil.copytree(complete_hf, tmp_path / "target")
        with pytest.raises(HymbaError, match=r"target: holds config.json, model.safetensors, not"):
            convert(native, target, overwrite=True)
        assert (target / WHOLE).exists()

    def test_what_appears_meanwhile_is_not_overwritten(self, complete_hf, tmp_path, monkeypatch):
        def appear(self, name, before, after):
            (tmp_path / "target").mkdir(exist_ok=True)
            (tmp_path / "target" / "mine").touch()

        monkeypatch.setattr("hymba_jax.convert.report.Report.converted", appear)
        with pytest.raises(HymbaError, match="target: exists already"):
            convert(complete_hf, tmp_path / "target")
        assert [path.name for path in tmp_path.rglob("*")] == ["target", "mine"]

    def test_a_link_to_the_target_stays_one(self, complete_hf, native, tmp_path):
        shutil.copytree(native, tmp_path / "real")
        (tmp_path / "link").symlink_to("real")
        convert(native, tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / WHOLE).exists()

    def test_directories_above_do_not_stay(self, native, tmp_path):
        damaged = shutil.copytree(native, tmp_path / "damaged")
        (damaged / "hf_copies.json").write_text('{"a": "b"}')
        with pytest.raises(HymbaError, match=r"hf_copies\.json: broken"):
            convert(damaged, tmp_path / "some" / "more" / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["damaged"]

    @pytest.mark.parametrize("place", [".", "..", "../hf"])
    def test_the_source_is_never_overwritten(self, complete_hf, place):
        with pytest.raises(HymbaError, match="is or holds the source"):
            convert(complete_hf, complete_hf / place, overwrite=True)
        assert (complete_hf / WHOLE).exists()

    def test_a_failure_leaves_the_old_one(self, complete_hf, native, tmp_path, monkeypatch):
        target = shutil.copytree(native, tmp_path / "target")
        before = (target / "config.toml").stat()
        monkeypatch.setattr("hymba_jax.convert.hf_to_native.model_toml", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(complete_hf, target, overwrite=True)
        assert (target / "config.toml").stat() == before
        assert [path.name for path in tmp_path.iterdir()] == ["target"]


def interrupt(*_args, **_options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["report.Report.converted", "convert.Report.finish"])
def test_interrupted_by_hand(place, complete_hf, native, tmp_path, monkeypatch):
    """While tensors are written; and at the end, when everything is."""
    monkeypatch.setattr(f"hymba_jax.convert.{place}", interrupt)
    for source in (complete_hf, native):
        with pytest.raises(SystemExit) as caught:
            cli.convert([str(source), str(tmp_path / "target")])
        assert caught.value.code == 130
        left = [path.name for path in tmp_path.iterdir()]
        assert left == ([] if "converted" in place else ["target"])
        shutil.rmtree(tmp_path / "target", ignore_errors=True)


def test_killed_at_the_last_moment(complete_hf, tmp_path):
    """The most that a kill can leave: everything is written, and nothing has its name yet."""
    script = """
import os, sys
from hymba_jax import cli, files
files._sync = lambda _: os.kill(os.getpid(), 9)
cli.convert(sys.argv[1:])
"""
    target = tmp_path / "target"
    command = [sys.executable, "-c", script, str(complete_hf), str(target)]
    result = subprocess.run(command, check=False, capture_output=True, timeout=300)
    assert result.returncode == -signal.SIGKILL
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"target\.[0-9a-f]{8}\.partial", left.name)
    convert(complete_hf, target)  # its own temporary name is another
    assert {*tmp_path.iterdir()} == {left, target}


class TestNoSpace:
    def test_it_is_seen_before_anything_is_written(self, complete_hf, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(HymbaError, match=r"needs 1\.2 MB, the disk has 1\.0 MB free"):
            convert(complete_hf, tmp_path / "some" / "target")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("direction", ["HF to native", "native to HF"])
    def test_it_is_one_line_while_writing(self, direction, complete_hf, native, tmp_path):
        source = complete_hf if direction == "HF to native" else native
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(SystemExit) as caught:
                cli.convert([str(source), str(tmp_path / "target")])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.code.startswith(f"error: {tmp_path}/target")
        assert "File too large" in caught.value.code
        assert "\n" not in caught.value.code
        assert not list(tmp_path.iterdir())


class TestVerify:
    CONFIG = config_from_hf(golden_config())

    def expected(self, tmp_path, **changes):
        arrays = dict(np.load(GOLDEN / "tiny-shared" / "golden.npz"))
        arrays |= {name: change(arrays[name]) for name, change in changes.items()}
        kept = {name: arrays[name] for name in ("input_ids", "logits") if arrays[name] is not None}
        np.savez(tmp_path / "expected.npz", **kept)
        return str(tmp_path / "expected.npz")

    def test_beyond_the_tolerance_the_exit_status_is_1(self, complete_hf, tmp_path, capsys):
        verify = self.expected(tmp_path, logits=lambda logits: logits + 0.01)
        command = [str(complete_hf), str(tmp_path / "target"), "--verify", verify]
        with pytest.raises(SystemExit) as caught:
            cli.convert([*command, "--tolerance", "0.009"])
        assert "was written, but its logits differ" in caught.value.code
        assert ", more than the tolerance 0.009" in caught.value.code
        assert "max difference 0.01" in capsys.readouterr().out

    def test_nan_never_passes(self, complete_hf, tmp_path):
        verify = self.expected(tmp_path, logits=lambda logits: logits * np.nan)
        with pytest.raises(HymbaError, match=r"differ from those of .* by nan"):
            convert(complete_hf, tmp_path / "target", verify=verify)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"logits": lambda _: None}, "needs arrays input_ids and logits"),
            ({"logits": lambda logits: logits[:, :-1]}, "logits have shape"),
            ({"input_ids": lambda ids: ids + 89}, "outside the vocabulary of 89"),
            ({"input_ids": lambda ids: ids / 2}, "not integers"),
        ],
    )
    def test_other_arrays_are_refused_before_anything_is_written(
        self, complete_hf, tmp_path, changes, message
    ):
        verify = self.expected(tmp_path, **changes)
        with pytest.raises(HymbaError, match=message):
            convert(complete_hf, tmp_path / "target", verify=verify)
        assert not (tmp_path / "target").exists()

    @pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -1.0])
    def test_a_tolerance_that_is_none(self, tolerance, complete_hf, tmp_path):
        with pytest.raises(HymbaError, match="tolerance is"):
            convert(complete_hf, tmp_path / "target", tolerance=tolerance)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"text", "not a .npz file that can be read"),
            (lambda content: content[: len(content) // 2], "not a .npz file that can be read"),
            (
                lambda content: content[:600] + b"\xff" * 9 + content[609:],
                "not a .npz file that can be read",
            ),
            ({"logits": np.array([{1: 2}], object)}, "logits is of Python objects"),
            ({"logits": np.zeros((1, 1, 89), np.complex64)}, "logits are complex64, not floating"),
            ({"logits": np.zeros((1, 1, 89), np.int32)}, "logits are int32, not floating-point"),
            ({"logits": np.zeros(3, [("a", "f4")])}, "not floating-point"),
            ({"input_ids": np.array([["a"]])}, "input_ids are not integers"),
            ({"input_ids": np.ones((1, 129), np.int32)}, "are 129 tokens long, the model has 128"),
        ],
    )
    def test_a_file_that_is_none(self, content, message, tmp_path):
        path = tmp_path / "expected.npz"
        arrays = {"input_ids": np.ones((1, 1), np.int32), "logits": np.zeros((1, 1, 89))}
        if isinstance(content, dict):
            arrays |= content
            if content.get("input_ids", arrays["input_ids"]).shape == (1, 129):
                arrays["logits"] = np.zeros((1, 129, 89), np.float32)
        np.savez(path, **arrays)
        if not isinstance(content, dict):
            path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))
        with pytest.raises(HymbaError) as caught:
            read_expected(path, self.CONFIG)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)

    def test_a_header_that_asks_for_all_memory(self, tmp_path):
        path, header = tmp_path / "expected.npz", io.BytesIO()
        shape = (10**9, 10**9, 89)
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        np.savez(path, input_ids=np.ones((1, 1), np.int32))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("logits.npy", header.getvalue())
        with pytest.raises(HymbaError, match=r"give fewer tokens, 8\.00 GB is the limit"):
            read_expected(path, self.CONFIG)

    def test_what_is_no_regular_file(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
            with pytest.raises(HymbaError, match="not a regular file"):
                read_expected(path, self.CONFIG)


def test_an_hf_checkpoint_has_to_be_converted_to_be_loaded(complete_hf):
    with pytest.raises(HymbaError, match="convert the HF checkpoint first, hymba convert"):
        load_model(complete_hf)


def test_an_hf_checkpoint_has_no_steps(complete_hf, tmp_path):
    with pytest.raises(HymbaError, match="has no steps"):
        convert(complete_hf, tmp_path / "target", step=3)
