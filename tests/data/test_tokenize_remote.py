"""`hymba tokenize` of corpora in emulated buckets."""

import pytest
from storage_emulators import FORBIDDEN, on_one_store

from hymba_jax.config.data import DataConfig
from hymba_jax.data import tokenize_command
from hymba_jax.data.listing import list_files
from hymba_jax.data.manifest import MANIFEST
from hymba_jax.data.tokenize_command import TokenizeConfig, TokenizeDataConfig
from hymba_jax.data.tokenize_sources import tokenize_sources
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.remote import RemotePath


@pytest.fixture
def corpus(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(4):
        (directory / f"{number}.txt").write_text(f"document {number}\n" * 50)
    return directory


@pytest.fixture
def bucket(bucket_url, corpus):
    """The same corpus in a bucket."""
    RemotePath(bucket_url).upload(corpus)
    return RemotePath(bucket_url)


def tokenize(corpus, output):
    data = TokenizeDataConfig(str(corpus), validation_fraction=0.3)
    config = TokenizeConfig(str(output), data, tokenizer="bytes", workers=1)
    tokenize_command.main(config)


def tokens(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.bin")}


@on_one_store
def test_an_object_that_vanishes_is_one_line_and_changes_nothing(
    bucket, corpus, tmp_path, monkeypatch
):
    def listed_before(*args, **options):
        listing = list_files(*args, **options)
        (bucket / "2.txt").unlink()
        return listing

    with monkeypatch.context() as patched:
        patched.setattr(tokenize_command, "list_files", listed_before)
        vanished = f"^{bucket}/2.txt: no such file or directory: check the path$"
        with pytest.raises(HymbaError, match=vanished):
            tokenize(bucket, tmp_path / "remote")
    assert not (tmp_path / "remote" / MANIFEST).exists()
    bucket.upload(corpus)
    tokenize(bucket, tmp_path / "remote")
    tokenize(corpus, tmp_path / "local")
    assert tokens(tmp_path / "remote") == tokens(tmp_path / "local") != {}


def test_what_cannot_be_read_or_written_is_one_line(bucket, tmp_path):
    missing, forbidden = (f"{bucket.scheme}://{name}/a" for name in ("missing", FORBIDDEN))
    for corpus, output, message in (
        (missing, tmp_path / "out", f"^{missing}: no such file or directory: check the path$"),
        (forbidden, tmp_path / "out", f"^{forbidden}: no permission to read it: check your cred"),
        (bucket, f"{bucket}/out", f"^{bucket}/out: has to be local: mount the bucket, or copy"),
    ):
        with pytest.raises(HymbaError, match=message):
            tokenize(corpus, output)
    assert not (tmp_path / "out").exists()


@on_one_store
def test_text_is_not_tokenized_into_a_bucket(corpus, bucket_url):
    config = DataConfig(path=str(corpus), tokenizer="bytes")
    with pytest.raises(
        HymbaError, match=f"^{bucket_url}: text is tokenized into the run directory"
    ):
        tokenize_sources(config, None, bucket_url, print, Display(quiet=True))
    assert not RemotePath(bucket_url).exists()
