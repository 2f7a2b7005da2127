import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tokenizers

from hymba_jax.config import HymbaConfig
from hymba_jax.data.corpus import standard_library
from hymba_jax.data.manifest import SIDES
from hymba_jax.errors import HymbaError
from hymba_jax.tokenizer import Tokenizer, build_tokenizer
from hymba_jax.tokenizer.control_tokens import USER

HF_FILES = Path(__file__).parents[3] / "shared" / "released"

AWKWARD = [
    "",
    " ",
    "\n",
    "<s>",
    "</s><pad><s>",
    "a<s> </s>\n<|endoftext|>",
    "\tif x:\r\n\t\treturn  'it''s'  \r\n\r\n",
    "  leading and trailing  ",
    "\0\x01\x7f\x80\ufeff\ufffd\U0010ffff",
    "é e\u0301 \u200d \U0001f468\u200d\U0001f469 中文 العربية ١٢٣",
    "1234567890 0x00e9",
]


def random_texts(count, seed=0):
    """Unicode strings of every plane and of characters that the split treats specially."""
    rng = random.Random(seed)
    special = " \t\n\r</s><pad>_'\"09aZ\u00a0\u2028\u3000\u0301é中\U0001f600"
    for _ in range(count):
        yield "".join(
            rng.choice(special)
            if rng.random() < 0.6
            else chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
            for _ in range(rng.randrange(60))
        )


@pytest.fixture(scope="module")
def library():
    corpus = standard_library(0.05)
    documents = [*corpus.documents(corpus.files)]
    return {side: [d.text for d, own in documents if own == side] for side in SIDES}


@pytest.fixture(scope="module")
def bpe(library):
    return build_tokenizer("bpe:1024", library["train"][::4])


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    if request.param == "bytes":
        return build_tokenizer("bytes", [])
    return request.getfixturevalue("bpe")


def test_round_trip_is_exact_and_free_of_specials(tokenizer):
    texts = [*AWKWARD, *random_texts(2000)]
    encoded = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert tokenizer.decode(ids) == text
        assert all(3 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.encode(text) == ids
        one = tokenizer.control.ordinary.encode(text, add_special_tokens=False)
        assert one.ids == ids


def test_long_runs_take_no_long_time(tokenizer):
    for run in (" ", "\n", "a", "\u00e9", "</s>", " \n"):
        text = run * 100_000
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_is_not_unicode_is_shown_in_short(tokenizer):
    with pytest.raises(HymbaError, match=r"^.{50,90} is not valid Unicode"):
        tokenizer.encode("x" * 1000 + "\ud800")


@pytest.mark.parametrize("method", ["encode", "encode_traced", "encode_with_spans"])
def test_other_threads_run_while_a_long_text_is_encoded(method):
    """As a server's loop has to."""
    text = "x = 1\n" * 50_000
    arguments = [text] if method == "encode" else [text, bytes([USER]) * len(text)]
    encode = getattr(build_tokenizer("bytes", []), method)
    thread = threading.Thread(target=encode, args=arguments)
    turns, interval = 0, sys.getswitchinterval()
    sys.setswitchinterval(1000)  # so that threads take turns only where one releases the GIL
    try:
        thread.start()
        while thread.is_alive():
            turns += 1
            time.sleep(0.001)
    finally:
        sys.setswitchinterval(interval)
    assert turns


def test_specials_come_first_and_decode_to_nothing(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode([1, *tokenizer.encode("text"), 2, 0]) == "text"


def test_bytes_are_one_token_each():
    tokenizer = build_tokenizer("bytes", ["not trained on"])
    assert tokenizer.vocab_size == 259
    points = [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 64)]
    text = "".join(map(chr, points))
    pairs = set(zip(text.encode(), tokenizer.encode(text), strict=True))
    # One to one, over every byte that UTF-8 uses.
    assert len(pairs) == len({byte for byte, _ in pairs}) == len({token for _, token in pairs})
    assert len(pairs) == 243


def test_bytes_of_tokens_join_to_the_text(tokenizer):
    for text in AWKWARD:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(tokenizer.vocab_size) is None


def test_bytes_of_tokens_with_byte_fallback():
    names = ["<unk>", "</s>", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    model.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    tokenizer = Tokenizer(model, None, "</s>")
    tokens = [*tokenizer.encode("aé\n"), tokenizer.eos_id]
    assert [tokenizer.token_bytes(token) for token in tokens] == [
        *(b"a", b"\xc3", b"\xa9", b"\n", b"</s>")
    ]


def test_text_like_specials_cannot_merge_into_them():
    tokenizer = build_tokenizer("bpe:400", ["<s></s><pad> <s>", "</s>", "<pad>"] * 100)
    for text in ("<s>", "</s>", "<pad>", "<s></s><pad> <s>"):
        assert min(tokenizer.encode(text)) > 2
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_compresses_source_code(bpe, library):
    assert bpe.vocab_size == 1024
    text = "".join(library["validation"])
    assert len(text.encode()) / len(bpe.encode(text)) > 2.6  # 2.73 trained on all of it
    assert len(bpe.encode("\n" + 8 * " ")) == 1
    assert len(bpe.encode(" self")) == 1


def test_bpe_training_is_deterministic_across_processes(bpe):
    code = """
from hymba_jax.config import HymbaConfig
from hymba_jax.data.corpus import standard_library
from hymba_jax.tokenizer import build_tokenizer
texts = [*standard_library(0.05).training_texts()][::4]
print(build_tokenizer("bpe:1024", texts).model.to_str())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stderr == b""
    assert json.loads(result.stdout) == json.loads(bpe.model.to_str())


def test_small_corpus_gives_a_smaller_vocabulary():
    tokenizer = build_tokenizer("bpe:4096", ["abab abab cdcd"])
    assert 259 < tokenizer.vocab_size < 280


def test_save_and_load(tokenizer, tmp_path):
    directory = tmp_path / "run" / "tokenizer"
    tokenizer.save(directory)
    tokenizer.save(directory)  # over an older one
    assert sorted(file.name for file in directory.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    texts = [*AWKWARD, *random_texts(200)]
    for path in (directory, directory / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)
        assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
        assert loaded.vocab_size == tokenizer.vocab_size
    from_spec = build_tokenizer(str(directory), [])
    assert from_spec.encode("def f():") == tokenizer.encode("def f():")


def foreign(directory, words, config=None, **special):
    """A word-level tokenizer.json such as others write, padding and truncating."""
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, "[UNK]")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    for name, is_special in special.items():
        model.add_tokens([tokenizers.AddedToken(name, special=is_special)])
    model.enable_truncation(2)
    model.enable_padding(length=9)
    model.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_foreign_specials_by_customary_name(tmp_path):
    words = ["[UNK]", "<|begin_of_text|>", "<|end_of_text|>", "a", "b"]
    tokenizer = Tokenizer.load(foreign(tmp_path, words))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 5)
    assert tokenizer.encode("a b a a") == [3, 4, 3, 3]  # neither truncated nor padded


def test_foreign_specials_by_config(tmp_path):
    config = {"bos_token": {"content": "BOS"}, "eos_token": "EOS", "pad_token": None}
    path = foreign(tmp_path, ["[UNK]", "<s>", "</s>", "a", "BOS", "EOS"], config)
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (4, 5)


def test_one_token_may_be_both_begin_and_end(tmp_path):
    tokenizer = Tokenizer.load(foreign(tmp_path, ["[UNK]", "a", "<|endoftext|>"]))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 2)


@pytest.mark.parametrize(
    ("words", "config"),
    [(["[UNK]", "<s>", "</s>"], {"bos_token": None}), (["[UNK]", "x", "</s>"], None)],
)
def test_no_begin_of_text(tmp_path, words, config):
    tokenizer = Tokenizer.load(foreign(tmp_path, words, config))
    assert (tokenizer.bos, tokenizer.bos_id, tokenizer.bos_ids) == (None, None, [])
    assert tokenizer.eos_id == 2
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").bos_id is None


def test_foreign_tokens_not_marked_special_still_come_by_id_only(tmp_path):
    path = foreign(tmp_path, ["[UNK]", "a"], **{"<s>": False, "</s>": False})
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
    assert tokenizer.encode("a<s>") == [0]


def test_no_text_becomes_a_control_token_even_if_the_model_has_its_name(tmp_path):
    """A word of a word-level vocabulary, a piece of a unigram one, the result of BPE merges."""
    names = ["[UNK]", "<s>", "</s>"]
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate([*names, "a"])}, "[UNK]")
    pieces = [*((name, 0.0) for name in names), *((letter, -9.0) for letter in "<s/>a ")]
    unigram = tokenizers.models.Unigram(pieces, unk_id=0)
    letters = [*names, *"<s/>a", "<s"]
    merged = tokenizers.models.BPE({w: i for i, w in enumerate(letters)}, [("<", "s"), ("<s", ">")])
    for model in (words, unigram, merged):
        tokenizer = tokenizers.Tokenizer(model)
        if model is words:
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.add_tokens(names)
        tokenizer = Tokenizer(tokenizer, "<s>", "</s>")
        ids = tokenizer.encode("a <s> </s>a")
        assert not {1, 2} & {*ids}
        assert tokenizer.encode_batch(["a <s> </s>a"]) == [ids]
        assert {1, 2} <= {*tokenizer.encode("a <s> </s>a", parse_special=True)}


def test_tokens_that_were_added_are_control_tokens_unless_they_are_spaces(tmp_path):
    added = {"<s>": True, "</s>": True, "<|im_start|>": False, "  ": False}
    tokenizer = Tokenizer.load(foreign(tmp_path, ["[UNK]", "a"], **added))
    assert tokenizer.control.ids == {"<s>": 2, "</s>": 3, "<|im_start|>": 4}
    text = "a <|im_start|>  a"
    assert tokenizer.encode(text) == [1, 0, 5, 1]
    assert tokenizer.encode(text, parse_special=True) == [1, 4, 5, 1]
    assert tokenizer.decode([4, 1]) == "<|im_start|> a"  # it is not special: it is shown
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode(text, parse_special=True) == [1, 4, 5, 1]


def test_special_tokens_keep_how_they_take_spaces(tmp_path):
    flags = {"content": "</s>", "rstrip": True, "special": True}
    config = {"added_tokens_decoder": {"3": flags}}
    tokenizer = Tokenizer.load(foreign(tmp_path, ["[UNK]", "a", "<s>", "</s>"], config))
    assert tokenizer.model.get_added_tokens_decoder()[3].rstrip
    assert tokenizer.special_tokens == {"<s>": 2, "</s>": 3}


def test_special_tokens_map(tmp_path):
    path = foreign(tmp_path, ["[UNK]", "<s>", "</s>", "B", "E", "P"], {"eos_token": "</s>"})
    special = {"bos_token": {"content": "B"}, "eos_token": "E", "pad_token": "P", "other": 3}
    (path / "special_tokens_map.json").write_text(json.dumps(special))
    # As in transformers 5.24.0: of an older form it counts more, beside a newer one less.
    named = {"bos_token": "B", "eos_token": "E", "pad_token": "P"}
    assert Tokenizer.load(path).named_tokens == named
    config = {"eos_token": "</s>", "added_tokens_decoder": {}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(path).named_tokens == named | {"eos_token": "</s>"}


def test_whether_a_tokenizer_fits_a_model():
    tokenizer = build_tokenizer("bytes", [])
    fits = HymbaConfig(vocab_size=259, bos_token_id=1, eos_token_id=2)
    tokenizer.check_fits(fits, "t")
    smaller = dataclasses.replace(fits, vocab_size=258, bos_token_id=0)
    with pytest.raises(HymbaError) as caught:
        tokenizer.check_fits(smaller, "t")
    assert str(caught.value) == (
        "tokenizer t does not fit: it has 259 tokens, model.vocab_size is 258; "
        "its bos token is 1, model.bos_token_id is 0"
    )
    padding = Tokenizer(tokenizer.model, "<pad>", "<pad>")
    with pytest.raises(HymbaError, match=r"its bos token is 0, .*its eos token is 0"):
        padding.check_fits(fits, "t")


WORDS = ["[UNK]", "<s>", "</s>", "a"]


def test_special_tokens_by_name(tmp_path):
    tokenizer = Tokenizer.load(foreign(tmp_path, WORDS, **{"<end>": True, "<think>": False}))
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2, "<end>": 4}


def test_chat_template(tmp_path):
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "é"}]
    cases = [
        (None, None),
        ("", ""),
        ("é {{x}}\n", "é {{x}}\n"),
        (several, "é"),
        (several[:1], None),
    ]
    for index, (named, template) in enumerate(cases):
        directory = tmp_path / str(index)
        directory.mkdir()
        tokenizer = Tokenizer.load(foreign(directory, WORDS, {"chat_template": named}))
        assert tokenizer.chat_template == template
        tokenizer.save(directory / "saved")
        assert Tokenizer.load(directory / "saved").chat_template == template
        (directory / "chat_template.jinja").write_text("ü\n", encoding="utf-8")
        assert Tokenizer.load(directory / "tokenizer.json").chat_template == "ü\n"
    assert Tokenizer.load(foreign(tmp_path, WORDS)).chat_template is None


@pytest.mark.parametrize(
    "broken", [3, {"default": "x"}, ["x"], [{"name": "default"}], [{"name": 1, "template": "x"}]]
)
def test_broken_chat_template(tmp_path, broken):
    path = foreign(tmp_path, WORDS, {"chat_template": broken})
    with pytest.raises(
        HymbaError, match=r"tokenizer_config\.json: chat_template is neither a string"
    ):
        Tokenizer.load(path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(HymbaError, match=r"chat_template\.jinja: not UTF-8"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("words", "config", "parts"),
    [
        (["[UNK]", "<s>"], None, ["no eos_token (looked for </s>, <eos>"]),
        (["[UNK]", "<s>"], {"eos_token": None}, ["no eos_token (looked for </s>, <eos>"]),
        (["[UNK]", "<s>"], {"bos_token": "[B]"}, ["no bos_token (looked for [B])"]),
    ],
)
def test_missing_specials(tmp_path, words, config, parts):
    with pytest.raises(HymbaError) as caught:
        Tokenizer.load(foreign(tmp_path, words, config))
    for part in [str(tmp_path / "tokenizer.json"), *parts]:
        assert part in str(caught.value)


def test_bad_tokenizer_files(tmp_path):
    with pytest.raises(HymbaError, match=r"tokenizer\.json: no such tokenizer file"):
        Tokenizer.load(tmp_path)
    with pytest.raises(HymbaError, match="unknown tokenizer 'sentencepiece': give bytes, bpe:SIZE"):
        build_tokenizer("sentencepiece", [])
    for content in ("", "{}", '{"model": 3}', "no JSON\nat all"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(HymbaError, match=r"tokenizer\.json: not a file of the tokenizers lib"):
            Tokenizer.load(tmp_path)
    foreign(tmp_path, ["[UNK]", "<s>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(HymbaError, match=r"tokenizer_config\.json: broken JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(HymbaError, match=r"tokenizer_config\.json: not a JSON object"):
        Tokenizer.load(tmp_path)


SPLIT = {"type": "FixedLength", "length": 0}
STRIP = {"type": "Strip", "content": "a", "start": 5, "stop": 5}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


@pytest.mark.parametrize(
    "broken", [{"pre_tokenizer": SPLIT}, {"decoder": STRIP}, {"normalizer": CHARSMAP}]
)
def test_panics_of_the_library_are_one_line(tmp_path, broken, capfd):
    foreign(tmp_path, WORDS)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | broken))

    def use():
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(tokenizer.encode("a"))

    with pytest.raises(HymbaError, match=r"the tokenizer failed \(|not a file of the tokenizers"):
        use()
    capfd.readouterr()  # what Rust itself says


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": 5}, "tokenizer_config.json: bos_token is neither a name nor null"),
        ({"bos_token": {"content": []}}, "bos_token is neither a name nor null"),
        ({"pad_token": True}, "pad_token is neither a name nor null"),
        ({"eos_token": "\ud800"}, "tokenizer.json: its special tokens"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: not an object"),
        ({"added_tokens_decoder": {"1": 3}}, "added_tokens_decoder: "),
        ({"added_tokens_decoder": {"1": {"content": 3}}}, "added_tokens_decoder: "),
        ({"added_tokens_decoder": {"1": {"content": "a", "lstrip": 3}}}, "added_tokens_decoder: "),
    ],
)
def test_wrong_types(tmp_path, config, message):
    with pytest.raises(HymbaError, match=message):
        Tokenizer.load(foreign(tmp_path, WORDS, config))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_files_that_are_none(tmp_path, name):
    file = foreign(tmp_path, WORDS) / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(HymbaError, match=f"{name}: is a FIFO, not a regular file"):
        Tokenizer.load(tmp_path)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(HymbaError, match=f"{name}: is a device, not a regular file"):
        Tokenizer.load(tmp_path)
    file.unlink()
    file.write_text(100_000 * "[")
    with pytest.raises(HymbaError, match=f"{name}: (not a file of the tokenizers|broken JSON)"):
        Tokenizer.load(tmp_path)


def test_words_have_a_longest_length():
    """400 KB of one word took 85 s to train on: the time grew with the square of its length."""
    word = "".join(random.Random(0).choices("abcdefgh", k=400_000))
    tokenizer = build_tokenizer("bpe:300", [word])
    assert (
        max(len(piece) for piece, _ in tokenizer.model.pre_tokenizer.pre_tokenize_str(word)) == 256
    )
    assert tokenizer.decode(tokenizer.encode(word)) == word


@pytest.mark.skipif(not HF_FILES.is_dir(), reason="HF tokenizer files not here")
def test_hf_tokenizer():
    tokenizer = Tokenizer.load(HF_FILES)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32001)
    assert tokenizer.encode("Hello world") == [15043, 3186]  # as every Llama 2 tokenizer
    for text in [*AWKWARD, *random_texts(300)]:
        ids = tokenizer.encode(text)
        assert not {1, 2, 32000} & set(ids)
        assert tokenizer.decode(ids) == text
