"""Tokenized corpora in emulated buckets, copied to the disk: once, whole, and compared."""

import subprocess
import sys
from collections import namedtuple

import pytest
from data.chat import TEMPLATE, record, write_lines
from storage_emulators import on_one_store

from hymba_jax.config.data import DataConfig, SourceConfig, WeightedSourceConfig
from hymba_jax.data import local_tokens, tokenize_command
from hymba_jax.data.local_tokens import with_local_tokens
from hymba_jax.data.tokenize_command import TokenizeConfig, TokenizeDataConfig
from hymba_jax.data.tokenized import TokenizedCorpus
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.file_lock import waited_for
from hymba_jax.remote import RemotePath


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenized")
    (directory / "corpus").mkdir()
    for number in range(4):
        (directory / "corpus" / f"{number}.txt").write_text(f"document {number}\n" * 50)
    data = TokenizeDataConfig(str(directory / "corpus"), validation_fraction=0.3)
    options = TokenizeConfig(str(directory / "out"), data, tokenizer="bytes", workers=1)
    tokenize_command.main(options)
    return directory / "out"


@pytest.fixture
def bucket(bucket_url, tokenized, tmp_path, monkeypatch):
    """The same corpus in a bucket; copies of it are made below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    RemotePath(bucket_url).upload(tokenized)
    return RemotePath(bucket_url)


@pytest.fixture
def downloads(monkeypatch):
    """The names of the files that are copied."""
    names = []
    download = RemotePath.download

    def record(self, directory, wanted):
        def recorded(name):
            if wanted(name):
                names.append(name)
            return wanted(name)

        download(self, directory, recorded)

    monkeypatch.setattr(RemotePath, "download", record)
    return names


def copied(corpus):
    config = DataConfig(path=str(corpus))
    return with_local_tokens(config, Display(quiet=True)).path


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def shards(names):
    return {name.partition(".")[0] for name in names if name.startswith(("train", "val"))}


def copies(tmp_path):
    return [path for path in (tmp_path / "hymba_jax" / "tokens").iterdir() if path.is_dir()]


def test_it_is_copied_once(bucket, tokenized, tmp_path, downloads):
    copied(bucket)
    count = len(downloads)
    assert count == len(files(tokenized)) - 1  # the manifest is read to know them
    copied(f"{bucket}/")
    assert len(downloads) == count
    (copy,) = copies(tmp_path)
    assert files(copy) == files(tokenized)
    assert TokenizedCorpus.open(copy).digest == TokenizedCorpus.open(tokenized).digest


@on_one_store
def test_masks_of_conversations_are_copied(bucket_url, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    chats = write_lines(tmp_path / "chats.jsonl", [record("a", str(number)) for number in range(9)])
    data = TokenizeDataConfig(str(chats), format="chat", validation_fraction=0.3)
    template = str(tmp_path / "chat.jinja")
    output = tmp_path / "out"
    tokenize_command.main(
        TokenizeConfig(str(output), data, tokenizer="bytes", workers=1, chat_template=template)
    )
    RemotePath(bucket_url).upload(output)
    copied(bucket_url)
    (copy,) = copies(tmp_path)
    assert files(copy) == files(output)
    assert TokenizedCorpus.open(copy).train.has_mask


@on_one_store
def test_every_source_that_is_tokens_in_a_bucket_has_a_copy(bucket, tmp_path, tokenized):
    path = str(bucket)
    sources = {
        "tokens": WeightedSourceConfig(path, weight=2.0),
        "unused": WeightedSourceConfig(path, weight=0.0),
        "text": WeightedSourceConfig(f"{path}/*.txt"),
        "local": WeightedSourceConfig(str(tokenized)),
    }
    validation = {"tokens": SourceConfig(path), "text": SourceConfig(f"{path}/tokenizer.json")}
    config = DataConfig(sources=sources, validation=validation)
    local = with_local_tokens(config, Display(quiet=True))
    (copy,) = copies(tmp_path)
    assert local.sources == sources | {"tokens": WeightedSourceConfig(str(copy), weight=2.0)}
    assert local.validation == validation | {"tokens": SourceConfig(str(copy))}
    assert local.path == ""


@on_one_store
@pytest.mark.parametrize(
    "interrupt",
    [lambda content: content[:7], lambda content: content[:7] + bytes(len(content) - 7)],
    ids=["shorter", "at full size"],
)
def test_an_interrupted_copy_continues(
    bucket, tokenized, tmp_path, monkeypatch, downloads, interrupt
):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(local_tokens, "damage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            copied(bucket)
    (partial,) = copies(tmp_path)
    tokens = partial / "train-00000-000.bin"
    tokens.write_bytes(interrupt(tokens.read_bytes()))
    del downloads[:]
    copied(bucket)
    assert shards(downloads) == {"train-00000-000"}
    assert files(*copies(tmp_path)) == files(tokenized)


@on_one_store
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda shard: shard.write_bytes(b"x" + shard.read_bytes()[1:]), "damaged in block 0"),
        (RemotePath.unlink, "no such file"),
    ],
    ids=["damaged", "vanished"],
)
def test_a_bad_shard_is_one_line_and_alone_copied_again(
    bucket, tokenized, tmp_path, downloads, spoil, problem
):
    spoil(bucket / "train-00000-000.bin")
    with pytest.raises(HymbaError, match=f"^{bucket}/train-00000-000.bin: {problem}"):
        copied(bucket)
    assert [copy.suffix for copy in copies(tmp_path)] == [".partial"]
    (bucket / "train-00000-000.bin").write_bytes((tokenized / "train-00000-000.bin").read_bytes())
    del downloads[:]
    copied(bucket)
    assert shards(downloads) == {"train-00000-000"}
    assert files(*copies(tmp_path)) == files(tokenized)


@on_one_store
def test_a_disk_that_is_too_small_is_one_line(bucket, monkeypatch, downloads):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(local_tokens.shutil, "disk_usage", lambda _: usage(100))
    with pytest.raises(HymbaError, match=rf"^{bucket}: the copy for this host needs 0\.0 MB, "):
        copied(bucket)
    assert downloads == []


@on_one_store
def test_text_with_a_manifest_of_its_own_is_no_tokens(bucket):
    (bucket / "tokenizer.json").unlink()
    assert copied(bucket) == str(bucket)


def test_processes_of_a_host_wait_for_one_another(tmp_path):
    program = """
import sys
from pathlib import Path
from hymba_jax.file_lock import waited_for
print("starting", flush=True)
with waited_for(Path(sys.argv[1])):
    print("held", flush=True)
"""
    lock = tmp_path / "lock"
    with waited_for(lock):
        waiting = subprocess.Popen(
            [sys.executable, "-c", program, lock], stdout=subprocess.PIPE, text=True
        )
        assert waiting.stdout.readline() == "starting\n"
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
    assert waiting.communicate(timeout=60)[0] == "held\n"
