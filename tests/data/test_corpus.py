import hashlib
import sysconfig
from pathlib import Path

import pytest

from hymba_jax.data.corpus import held_out_by_file_name, standard_library
from hymba_jax.data.records import Document


def test_standard_library_split():
    """By the first byte of the SHA-1 of the file's name: the files that gzip's numbers are of."""
    corpus = standard_library(0.05)
    documents = {piece.name: (piece.text, side) for piece, side in corpus.documents(corpus.files)}
    assert len(documents) == len(corpus.files) > 400
    assert {"argparse.py", "json/decoder.py"} <= documents.keys()
    assert not any(name.startswith(("test/", "idlelib/", "site-packages/")) for name in documents)
    for name, (_, side) in documents.items():
        first = hashlib.sha1(name.split("/")[-1].encode()).digest()[0]
        assert (side == "validation") == (first % 20 == 0)
    source = Path(sysconfig.get_path("stdlib"), "json", "decoder.py").read_text(encoding="utf-8")
    assert documents["json/decoder.py"][0] == source
    texts = [text for text, side in documents.values() if side == "train"]
    assert list(corpus.training_texts()) == texts


@pytest.mark.parametrize("fraction", [0.004, 0.05, 0.3, 0.99])
def test_about_the_fraction_of_file_names_is_held_out(fraction):
    documents = [Document(f"document {number}", "") for number in range(10_000)]
    share = sum(held_out_by_file_name(document, fraction) for document in documents) / 10_000
    assert abs(share - fraction) < 1 / 256 + 0.01  # a step of the hash, and twice its deviation
