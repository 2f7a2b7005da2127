"""Paths as people write them, broken files, and writing that is whole or not there."""

import os
import stat
from pathlib import Path

import pytest

from hymba_jax.errors import HymbaError
from hymba_jax.files import (
    read_json,
    read_text,
    read_toml,
    replace_text,
    resolve_location,
    resolve_path,
    written_beside,
)


def contents(directory):
    return sorted(path.name for path in directory.iterdir())


class TestResolvePath:
    def test_expands_the_home_directory(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        for resolve in (resolve_location, resolve_path):
            assert resolve("~/runs/a") == Path("/home/me/runs/a")
            assert resolve("runs/a~") == Path("runs/a~")

    @pytest.mark.parametrize("url", ["https://host/a", "file:/a", "gcs://bucket/a"])
    def test_refuses_urls_by_scheme(self, url):
        scheme = url.partition(":")[0]
        only = f"{scheme}:// is not supported here, only local paths, gs:// and s3:// are"
        for resolve in (resolve_location, resolve_path):
            with pytest.raises(HymbaError, match=only):
                resolve(url)

    def test_buckets_only_where_they_can_be(self):
        with pytest.raises(HymbaError, match=r"^gs://a/b: has to be local: mount the bucket, or"):
            resolve_path("gs://a/b")
        for url in ("gs://", "s3://a/*", "s3://a/[b]"):
            with pytest.raises(HymbaError, match="name a bucket and a directory in it"):
                resolve_location(url)

    def test_names_the_package_that_is_missing(self, missing_package):
        scheme, extra = missing_package
        missing = (
            rf"^{scheme}://a/b: the package .* is missing: pip install 'hymba_jax\[{extra}\]'$"
        )
        with pytest.raises(HymbaError, match=missing):
            resolve_location(f"{scheme}://a/b")

    def test_takes_colons_that_are_no_scheme(self):
        assert resolve_path("bpe:4096") == Path("bpe:4096")
        assert resolve_path("a/b:/c") == Path("a/b:/c")

    @pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/a"])
    def test_refuses_what_is_no_path(self, path):
        with pytest.raises(HymbaError):
            resolve_path(path)


class TestReading:
    @pytest.mark.parametrize("read", [read_text, read_json, read_toml])
    def test_refuses_what_is_no_regular_file(self, read, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        for path, kind in (("/dev/zero", "device"), (tmp_path / "fifo", "FIFO")):
            with pytest.raises(HymbaError, match=f"is a {kind}"):
                read(path)

    def test_drops_a_byte_order_mark(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(b"\xef\xbb\xbf{}")
        assert read_json(path) == {}
        path.write_bytes(b"\xef\xbb\xbfa = 1")
        assert read_toml(path) == {"a": 1}

    def test_refuses_deep_nesting(self, tmp_path):
        path = tmp_path / "file"
        for text in ("[" * 100_000, '{"a":' * 100_000):
            path.write_text(text)
            with pytest.raises(HymbaError, match="nested too deeply"):
                read_json(path)
        for text in ("a = " + "[" * 100_000, "a = " + "{b = " * 100_000):
            path.write_text(text)
            with pytest.raises(HymbaError, match="nested too deeply"):
                read_toml(path)

    @pytest.mark.parametrize("content", [b"\xff", b"[", b"5", b"null", b'{"a": 1e}'])
    def test_names_the_file_that_is_broken(self, content, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(HymbaError, match=str(path)):
            read_json(path)


class TestReplaceText:
    def test_keeps_permissions_and_neighbors(self, tmp_path):
        path = tmp_path / "x"
        path.write_text("old")
        path.chmod(0o600)
        (tmp_path / "x.partial").write_text("kept")
        replace_text(path, "new")
        assert path.read_text() == "new"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert contents(tmp_path) == ["x", "x.partial"]

    def test_a_new_file_has_the_usual_permissions(self, tmp_path):
        replace_text(tmp_path / "x", "new")
        (tmp_path / "y").write_text("usual")
        assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode

    def test_writes_to_what_a_link_points_to(self, tmp_path):
        (tmp_path / "link").symlink_to("file")
        for text in ("first", "second"):
            replace_text(tmp_path / "link", text)
            assert (tmp_path / "file").read_text() == text
        assert (tmp_path / "link").is_symlink()

    def test_writes_to_a_device(self):
        replace_text(Path("/dev/null"), "text")
        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)

    def test_leaves_the_old_text_where_the_new_one_cannot_be_written(self, tmp_path):
        (tmp_path / "x").write_text("old")
        with pytest.raises(UnicodeEncodeError):
            replace_text(tmp_path / "x", "new \ud800")
        assert (tmp_path / "x").read_text() == "old"
        assert contents(tmp_path) == ["x"]


class TestWrittenBeside:
    def test_replaces_a_directory_and_nothing_else(self, tmp_path):
        for name in ("a", "a.partial", "a.replaced"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "old").touch()
        with written_beside(tmp_path / "a") as beside:
            (beside / "new").touch()
        assert contents(tmp_path) == ["a", "a.partial", "a.replaced"]
        assert contents(tmp_path / "a") == ["new"]
        assert contents(tmp_path / "a.partial") == contents(tmp_path / "a.replaced") == ["old"]

    def fail_halfway(self, directory):
        with written_beside(directory) as beside:
            (beside / "new").touch()
            raise KeyError

    def test_an_exception_leaves_what_was_there(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "old").touch()
        with pytest.raises(KeyError):
            self.fail_halfway(tmp_path / "a")
        assert contents(tmp_path) == ["a"]
        assert contents(tmp_path / "a") == ["old"]

    def test_an_exception_leaves_no_directories_above(self, tmp_path):
        (tmp_path / "there").mkdir()
        with pytest.raises(KeyError):
            self.fail_halfway(tmp_path / "there" / "more" / "of" / "a")
        assert contents(tmp_path / "there") == []

    def test_a_link_to_a_directory_stays_one(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "link").symlink_to("a")
        with written_beside(tmp_path / "link") as beside:
            (beside / "new").touch()
        assert (tmp_path / "link").is_symlink()
        assert contents(tmp_path / "a") == ["new"]


def test_errors_are_one_line_without_control_characters():
    assert str(HymbaError("a\nb\x1b[31m\x9b\u2028")) == "a\\nb\\x1b[31m\\x9b\\u2028"
