import pytest

from hymba_jax.config.data import DataConfig, SourceConfig, WeightedSourceConfig
from hymba_jax.errors import HymbaError


def test_every_problem_is_named_at_once():
    with pytest.raises(HymbaError) as caught:
        DataConfig(text_field="", tokenizer="bpe:12", sequence_length=0, validation_fraction=0.0)
    message = str(caught.value)
    for part in (
        "text_field",
        "'bpe:12'",
        "from 259",
        "sequence_length is 0",
        "fraction is 0.0, below 0.0039",
    ):
        assert part in message
    assert "\n" not in message


def test_only_the_standard_library_is_held_out_in_steps():
    assert DataConfig("pages", validation_fraction=0.001).validation_fraction == 0.001
    with pytest.raises(HymbaError, match=r"0\.001, below 0\.0039.*standard library"):
        DataConfig(validation_fraction=0.001)


def test_a_field_of_text_is_refused_for_conversations():
    chat = WeightedSourceConfig("chat", format="chat", text_field="body")
    with pytest.raises(HymbaError, match=r"sources\.one\.text_field has no effect on format chat"):
        DataConfig(sources={"one": chat})
    with pytest.raises(HymbaError, match="text_field has no effect, as no source is text"):
        DataConfig("chat", format="chat", text_field="body")
    held_out = {"text": SourceConfig("pages", format="text")}
    DataConfig("chat", format="chat", text_field="body", validation=held_out)


@pytest.mark.parametrize(
    "tokenizer",
    [
        "bpe:",
        "bpe:many",
        "bpe:-300",
        "bpe:258",
        "bpe:3e3",
        "bpe:999999999999",
        "bpe:" + "9" * 5000,
        "",
    ],
)
def test_bad_tokenizer_specs(tokenizer):
    with pytest.raises(HymbaError, match="tokenizer"):
        DataConfig(tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "size"), [("bytes", None), ("bpe:259", 259), ("bpe:50000", 50000), ("a/b", None)]
)
def test_bpe_size(tokenizer, size):
    assert DataConfig(tokenizer=tokenizer).bpe_size == size
