"""Files in emulated buckets: what a store guarantees, and what it refuses in one line."""

import pytest
from storage_emulators import FORBIDDEN

from hymba_jax.errors import HymbaError
from hymba_jax.files import (
    read_json,
    read_text,
    read_toml,
    replace_text,
    resolve_location,
    written_beside,
)
from hymba_jax.remote import RemotePath


@pytest.fixture
def directory(bucket_url):
    return RemotePath(bucket_url)


def other_bucket(directory, name):
    return RemotePath(f"{directory.scheme}://{name}/run")


def test_names_are_those_of_the_url(bucket_url):
    path = resolve_location(f"{bucket_url}/a//b.txt/")
    assert str(path) == f"{bucket_url}/a/b.txt"
    assert resolve_location(path) == path == RemotePath(bucket_url) / "a" / "b.txt"
    # pathlib, and TOML files that it wrote, have one slash.
    assert resolve_location(bucket_url.replace("://", ":/")) == RemotePath(bucket_url)
    assert (path.name, path.stem, path.with_name("c")) == (
        "b.txt",
        "b",
        RemotePath(bucket_url) / "a/c",
    )
    assert [str(above) for above in path.parents] == [
        *(f"{bucket_url}/a", bucket_url, bucket_url.rpartition("/")[0]),
    ]


def test_what_is_written_is_seen(directory):
    assert (directory.exists(), [*directory.iterdir()], directory.glob("*")) == (False, [], [])
    (directory / "a.py").write_bytes(b"first")
    (directory / "a.py").write_bytes(b"second")
    (directory / "below" / "b.py").write_bytes(b"")
    assert (directory / "a.py").read_bytes() == b"second"
    assert directory.is_dir()
    assert not directory.is_file()
    assert (directory / "a.py").is_file()
    assert {path.name for path in directory.iterdir()} == {"a.py", "below"}
    assert directory.glob("*.py") == [directory / "a.py"]
    assert directory.glob("*/*.py") == [directory / "below" / "b.py"]
    (directory / "a.py").unlink()
    (directory / "a.py").unlink()
    assert [*directory.iterdir()] == [directory / "below"]
    directory.rmtree()
    assert not directory.exists()
    directory.rmtree()


def test_an_object_is_created_once(directory):
    assert (directory / "lock").create(b"first")
    assert not (directory / "lock").create(b"second")
    assert (directory / "lock").read_bytes() == b"first"


def test_directories_are_copied(directory, tmp_path):
    with written_beside(directory / "copy") as local:
        (local / "below").mkdir()
        (local / "below" / "file").write_bytes(bytes(range(256)))
        (local / "text").write_text("text")
    (directory / "copy").download(tmp_path)
    assert (tmp_path / "below" / "file").read_bytes() == bytes(range(256))
    assert (tmp_path / "text").read_text() == "text"


def test_texts_are_read_as_local_ones(directory):
    file = directory / "file"
    replace_text(file, "ä = 1")
    assert read_text(file) == "ä = 1"
    with pytest.raises(HymbaError, match=f"^{file}: not a TOML file"):
        read_toml(file)
    file.write_bytes(b"\xff")
    with pytest.raises(HymbaError, match=f"^{file}: not UTF-8 text"):
        read_json(file)
    with pytest.raises(HymbaError, match=f"^{directory}/no: no such file or directory: check"):
        read_json(directory / "no")


WRITES = {
    "write": lambda path: path.write_bytes(b""),
    "create": lambda path: path.create(b""),
    "replace": lambda path: replace_text(path, ""),
}
READS = {
    "read": read_text,
    "exists": lambda path: path.exists(),
    "list": lambda path: [*path.iterdir()],
}


@pytest.mark.parametrize("operation", [*WRITES, *READS])
def test_without_permission(directory, operation):
    path, verb = other_bucket(directory, FORBIDDEN), "write" if operation in WRITES else "read"
    with pytest.raises(HymbaError, match=f"^{path}: no permission to {verb} it: check your cred"):
        (WRITES | READS)[operation](path)


def test_without_a_bucket(directory, tmp_path):
    path = other_bucket(directory, "missing")
    for write in WRITES.values():
        with pytest.raises(HymbaError, match=f"^{path}: no such bucket: create it first$"):
            write(path)
    assert not path.exists()
    assert [*path.iterdir()] == []
    for read in (read_text, lambda path: path.download(tmp_path)):
        with pytest.raises(HymbaError, match=f"^{path}: no such file or directory: check the path"):
            read(path)


def test_without_a_server(directory, monkeypatch):
    def fail(_):
        raise OSError("no\nroute")

    monkeypatch.setattr(directory._store, "cat_file", fail)
    with pytest.raises(HymbaError) as caught:
        directory.read_bytes()
    assert str(caught.value) == f"{directory}: cannot be read (OSError: no)"
