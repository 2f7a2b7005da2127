import io
import os
import socket

import fsspec
import pytest
from storage_emulators import FORBIDDEN

from hymba_jax.data.listing import File, list_files
from hymba_jax.errors import HymbaError


@pytest.fixture
def bucket():
    """The URL of an empty directory of fsspec's files in memory."""
    filesystem = fsspec.filesystem("memory")
    yield "memory://bucket"
    filesystem.rm("/bucket", recursive=True)


@pytest.fixture(params=["local", "remote"])
def corpus(request):
    """A writer of files by name, and where they are: on the disk and behind a URL."""
    if request.param == "local":
        root = str(request.getfixturevalue("tmp_path"))
    else:
        root = request.getfixturevalue("bucket")
    filesystem, base = fsspec.url_to_fs(root)

    def write_all(*names, content=b"text"):
        for name in names:
            path = f"{base}/{name}"
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            filesystem.pipe_file(path, content)

    return root, write_all


def names(path, **options):
    return [file.name for file in list_files(path, **options).files]


def error_of(path, **options):
    with pytest.raises(HymbaError) as caught:
        list_files(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_files_are_sorted_named_from_the_root_and_open(corpus):
    root, write = corpus
    write("b.txt", "a/z.txt", "a b.txt", content=b"12345")
    write("a/é.txt", "deep/er/x", content=b"67")
    listing = list_files(root)
    expected = [("a b.txt", 5), ("a/z.txt", 5), ("a/é.txt", 2), ("b.txt", 5), ("deep/er/x", 2)]
    assert [(file.name, file.size) for file in listing.files] == expected
    assert [file.path for file in listing.files] == [f"{root}/{name}" for name, _ in expected]
    assert not listing.skipped
    for file in listing.files:
        with file.open() as opened:
            assert opened.read(3) == (b"123" if file.size == 5 else b"67")
            assert opened.seek(0, io.SEEK_END) == file.size
    (alone,) = list_files(f"{root}/a/z.txt").files
    assert (alone.name, alone.path, alone.size) == ("z.txt", f"{root}/a/z.txt", 5)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["1.txt", "2.txt", "10.txt"]),
        ("?.txt", ["1.txt", "2.txt"]),
        ("[!1].*", ["2.md", "2.txt"]),
        ("*/1.*", ["a/1.txt"]),
        ("**/1.txt", ["1.txt", "a/1.txt", "a/b/1.txt"]),
        ("**", ["1.txt", "10.txt", "2.md", "2.txt", "a/1.txt", "a/b/1.txt"]),
        ("a/**/*.txt", ["1.txt", "b/1.txt"]),  # below a/, where the wildcards begin
    ],
)
def test_globs(corpus, pattern, expected):
    root, write = corpus
    write("1.txt", "2.txt", "10.txt", "2.md", "a/1.txt", "a/b/1.txt", "a/.x/1.txt")
    assert names(f"{root}/{pattern}") == sorted(expected)


def test_globs_that_are_none(corpus):
    root, write = corpus
    write("part [1].txt", "part 1.txt", "[a]/1.txt", "a/2.txt")
    assert names(f"{root}/part [1].txt") == ["part [1].txt"]  # the file of that name
    assert names(f"{root}/[a]/*") == ["1.txt"]  # in the directory of that name
    assert names(f"{root}/[a-b]/*") == ["a/2.txt"]
    assert error_of(f"{root}/part 1.txt/*")
    assert f"{root}/*.md: no files to read" in error_of(f"{root}/*.md")
    assert "'**' can only be an entire path component" in error_of(f"{root}/a**/b")


def test_hidden_empty_and_run_files_are_left_out_and_counted(corpus):
    root, write = corpus
    write("kept.txt", ".hidden", ".git/a", ".git/b", "a/.hidden", "config.toml", "b/config.toml")
    write("empty", content=b"")
    for run in ("runs/1", "runs/2"):
        write(*(f"{run}/{file}" for file in ("config.toml", "tokenizer.json", "checkpoints/3/x")))
    write("started/log.jsonl")
    listing = list_files(root, skip=[f"{root}/started"])
    assert [file.name for file in listing.files] == ["b/config.toml", "config.toml", "kept.txt"]
    assert listing.skipped == {
        "hidden entries": 3,
        "empty files": 1,
        "run directories": 2,
        "the output": 1,
    }
    assert names(f"{root}/**/*.toml") == ["b/config.toml", "config.toml"]
    assert names(f"{root}/.git") == ["a", "b"]  # which was asked for by name
    assert "choose an output of its own" in error_of(root, skip=[root])
    message = error_of(f"{root}/empty*")
    assert "no files to read (left out: empty files: 1, hidden entries: 2" in message


def test_directories_of_object_stores(bucket, monkeypatch):
    """Which are listed or not, and may be objects of their own without content."""
    memory = fsspec.filesystem("memory")
    run = [f"/bucket/run/{name}" for name in ("config.toml", "tokenizer.json", "checkpoints/3/x")]
    for path in ("/bucket/a/1.txt", *run):
        memory.pipe_file(path, b"text")
    find = type(memory).find

    def objects(self, path, **options):
        found = find(self, path, **{**options, "withdirs": False})
        found = {name: entry | {"etag": f"of {name}"} for name, entry in found.items()}
        return {**found, "/bucket/a/": {"name": "/bucket/a/", "size": 0, "type": "file"}}

    monkeypatch.setattr(type(memory), "find", objects)
    listing = list_files(bucket)
    (file,) = listing.files
    assert (file.name, file.version) == ("a/1.txt", "of /bucket/a/1.txt")
    assert listing.skipped == {"run directories": 1}


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    (tmp_path / "text").write_text("text")
    os.mkfifo(tmp_path / "fifo.jsonl")  # opening it would wait for a writer
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "below").symlink_to("text/below")
    (tmp_path / "self").symlink_to("self")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))  # of at most 108 characters
        listing = list_files(str(tmp_path))
    assert [file.name for file in listing.files] == ["text"]
    assert listing.skipped == {
        "FIFOs": 1,
        "devices": 1,
        "dangling links": 2,
        "link loops": 1,
        "sockets": 1,
    }
    assert f"{tmp_path}/fifo.jsonl: is a FIFO" in error_of(tmp_path / "fifo.jsonl")
    assert f"{tmp_path}/zero: is a device" in error_of(tmp_path / "zero")
    assert f"{tmp_path}/dangling: no such file" in error_of(tmp_path / "dangling")
    assert f"{tmp_path}/self: cannot be read" in error_of(tmp_path / "self")
    with pytest.raises(HymbaError, match="is a FIFO"):
        File("fifo", str(tmp_path / "fifo.jsonl"), 1).open()  # put there after the listing


def test_links_are_followed_but_not_around_in_circles(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "1.txt").write_text("text")
    (outside / "deep" / "back").symlink_to(root)
    (root / "a").mkdir(parents=True)
    (root / "a" / "up").symlink_to("..")
    (root / "link").symlink_to(outside)
    (root / "file").symlink_to(outside / "deep" / "1.txt")
    listing = list_files(str(root))
    assert [file.name for file in listing.files] == ["file", "link/deep/1.txt"]
    assert listing.skipped == {"link loops": 2}
    (tmp_path / "entry").symlink_to("root")
    assert list_files(str(tmp_path / "entry")).skipped == {"link loops": 2}


def test_paths_as_people_write_them(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.txt").write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "data")
    url = f"file:{tmp_path}/data"
    for path in ("~/data", "~/data/*", url, url.replace(":", "://"), f"{url}/1*", "."):
        assert names(path) == ["1.txt"]
    assert names("*.txt") == ["1.txt"]
    assert "/missing: no such file or directory" in error_of(tmp_path / "missing")
    tasks = "a generated task is mqar, selective_copying, induction"
    assert error_of("mqr:8:32").endswith(f"check the data path; {tasks}")
    assert "no such file or directory" in error_of("memory://missing/bucket")


def test_unreadable_directory_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path}/locked: cannot be read (Permission denied)" in error_of(tmp_path)


def test_schemes_that_nothing_reads_are_refused(missing_package):
    assert "nope://a/b: nothing reads nope://" in error_of("nope://a/b")
    scheme, extra = missing_package
    message = error_of(f"{scheme}://bucket/data")
    assert f"{scheme}:// is missing: pip install 'hymba_jax[{extra}]'" in message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("bucket"), "no such file or directory"),
        (PermissionError("403"), "no permission to read it: check your credentials"),
        (ConnectionError("reset\nby peer"), "cannot be read (ConnectionError: reset)"),
        (LookupError("no token"), "cannot be read (LookupError: no token)"),
    ],
)
def test_what_a_server_answers_is_one_line(bucket, monkeypatch, error, reason):
    fsspec.filesystem("memory").pipe_file("/bucket/1.txt", b"text")
    (file,) = list_files(bucket).files

    def refuse(*_, **__):
        raise error

    with file.open() as opened:
        opened.raw._file.read = refuse
        with pytest.raises(HymbaError) as caught:
            opened.read()
    assert str(caught.value).startswith(f"{bucket}/1.txt: {reason}")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", refuse)
    assert error_of(bucket).startswith(f"{bucket}: {reason}")


@pytest.fixture
def emulated(bucket_url):
    """A corpus of two files in a bucket of an emulated store, and the store."""
    store, path = fsspec.url_to_fs(bucket_url)
    for name in ("b.txt", "a/z.txt", ".hidden"):
        store.pipe_file(f"{path}/{name}", f"text of {name}".encode())
    return bucket_url, store


def test_buckets_of_stores(emulated):
    url, store = emulated
    listing = list_files(url)
    assert [(file.name, file.path, file.size) for file in listing.files] == [
        ("a/z.txt", f"{url}/a/z.txt", 15),
        ("b.txt", f"{url}/b.txt", 13),
    ]
    assert listing.skipped == {"hidden entries": 1}
    assert names(f"{url}/**/z*") == ["a/z.txt"]
    assert names(f"{url}/b.txt") == ["b.txt"]
    with listing.files[0].open() as file:
        assert file.read() == b"text of a/z.txt"
    store.rm_file(listing.files[0].path.partition("://")[2])
    with pytest.raises(HymbaError, match=f"^{url}/a/z.txt: no such file or directory"):
        listing.files[0].open()
    assert names(url) == ["b.txt"]


def test_buckets_that_cannot_be_read(emulated):
    scheme = emulated[0].partition(":")[0]
    assert error_of(f"{scheme}://missing/a").startswith(f"{scheme}://missing/a: no such file or")
    refused = f"{scheme}://{FORBIDDEN}/a"
    assert error_of(refused) == f"{refused}: no permission to read it: check your credentials"
    with pytest.raises(HymbaError, match=f"^{refused}: no permission to read it"):
        File("a", refused, 1).open().read()
