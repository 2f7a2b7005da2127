"""Text as it comes is the text that comes out when all is decoded at once, cut at a stop string."""

import random
import time
from pathlib import Path

import pytest
import tokenizers
from slow import slow_but

from hymba_jax.inference.text_stream import TextStream
from hymba_jax.tokenizer import Tokenizer, build_tokenizer

HF_FILES = Path(__file__).parents[3] / "shared" / "released"

TEXT = "Hello world,\n  é ü \u20ac e\u0301 中文 👨\u200d👩\u200d👧 \ufffd\ufffd 😀😀!\n\n"
# Bytes of which characters begin, go on, or cannot be.
BYTES = b"\xe2\x82\xac\xf0\x9f\x98\x80\xed\xa0\xff\xc0\xef\xbf\xbd\xc3A\n "


@pytest.fixture(scope="module", params=["bytes", "bpe", "byte fallback", "words", "hf"])
def tokenizer(request):
    if request.param == "hf" and not HF_FILES.is_dir():
        pytest.skip("the HF files are not available")
    return {
        "bytes": lambda: build_tokenizer("bytes", []),
        "bpe": lambda: build_tokenizer("bpe:400", [TEXT] * 9),
        "byte fallback": byte_fallback,
        "words": words,
        "hf": lambda: Tokenizer.load(HF_FILES),
    }[request.param]()


def byte_fallback():
    """A tokenizer as SentencePiece's: a space before the text, bytes for what it does not know."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += list("▁Helowrd,!é\ufffd")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    model.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    model.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(model, "<s>", "</s>")


def byte_level():
    return build_tokenizer("bytes", [])


def byte_token(tokenizer, byte):
    """The token of a byte-level tokenizer that is this byte, by GPT-2's names of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in printable]
    name = chr(byte) if byte in printable else chr(256 + others.index(byte))
    return tokenizer.model.token_to_id(name)


def token_size(tokenizer, token):
    """The bytes of a token of the tokenizer with byte fallback."""
    name = tokenizer.model.id_to_token(token)
    return 1 if len(name) > 1 else len(name.replace("▁", " ").encode())


def words():
    """Letters without a decoder: spaces come between tokens."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *TEXT[:40]])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return Tokenizer(model, "<s>", "</s>")


def stream(tokenizer, prompt, tokens, stop=()):
    """The deltas, the last of them what was held back, and the stream."""
    text = TextStream(tokenizer, prompt, stop)
    return [*map(text.push, tokens), text.finish()], text


def decoded(tokenizer, prompt, tokens):
    return tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]


def random_tokens(tokenizer, rng, count):
    """Words, lone bytes, special tokens, and numbers that are no tokens."""
    model = tokenizer.model
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    lone = [model.token_to_id(f"<0x{byte:02X}>") for byte in BYTES]
    lone += [model.token_to_id(letter) for letter in sorted(alphabet)]
    kinds = [
        tokenizer.encode(TEXT),
        [token for token in lone if token is not None] or [3],
        [*tokenizer.special_tokens.values(), tokenizer.vocab_size + 5],
        range(tokenizer.vocab_size),
    ]
    return [rng.choice(rng.choices(kinds, [9, 9, 2, 2])[0]) for _ in range(rng.randrange(count))]


def test_deltas_join_to_the_text(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        prompt, tokens = (random_tokens(tokenizer, rng, count) for count in (14, 30))
        deltas, _ = stream(tokenizer, prompt, tokens)
        assert "".join(deltas) == decoded(tokenizer, prompt, tokens), (prompt, tokens)


def test_prompt_and_completion_split_anywhere(tokenizer):
    tokens = tokenizer.encode(TEXT)
    for cut in range(len(tokens)):
        prompt = [tokenizer.bos_id, *tokens[:cut]]
        deltas, _ = stream(tokenizer, prompt, [*tokens[cut:], tokenizer.eos_id])
        assert "".join(deltas) == decoded(tokenizer, prompt, tokens[cut:])


def test_no_halves_of_characters():
    tokenizer = build_tokenizer("bytes", [])
    deltas, _ = stream(tokenizer, [], tokenizer.encode("aé😀b"))
    assert deltas == ["a", "", "é", "", "", "", "😀", "b", ""]
    deltas, _ = stream(tokenizer, [], tokenizer.encode("é😀")[:-1])
    assert deltas == ["", "é", "", "", "", "\ufffd"]


def test_byte_fallback_waits_for_the_end_of_a_run():
    """An invalid byte makes the bytes before it invalid too, as far as they go without a word."""
    tokenizer = byte_fallback()
    tokens = tokenizer.encode("H😀o")
    assert len(tokens) == 7  # "▁", "H", four bytes, "o"
    deltas, _ = stream(tokenizer, tokens[:2], tokens[2:])
    assert deltas == ["", "", "", "", "😀o", ""]
    deltas, _ = stream(tokenizer, tokens[:2], tokens[2:6] + tokens[2:4])
    assert deltas == [*6 * [""], 6 * "\ufffd"]


def test_the_space_of_the_first_token_depends_on_the_prompt():
    tokenizer = byte_fallback()
    space, *letters = tokenizer.encode("oe")
    for prompt, text in (([], "oe"), ([tokenizer.bos_id], "oe"), (letters, " oe")):
        assert "".join(stream(tokenizer, prompt, [space, *letters])[0]) == text


def test_stop_strings_at_random(tokenizer):
    """The cut is before the stop string that begins first, however the text came in tokens."""
    rng = random.Random(1)
    met = 0
    for _ in range(500):
        letters = rng.choices("Helo wrd\n", k=rng.randrange(1, 4))
        tokens = tokenizer.encode("".join(rng.choices(letters, k=rng.randrange(20))))
        stop = [
            "".join(rng.choices(letters, k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))
        ]
        text = decoded(tokenizer, [], tokens)
        cut = min((text.find(string) for string in stop if string in text), default=None)
        deltas, end = stream(tokenizer, [], tokens, stop)
        assert "".join(deltas) == text[:cut], (tokens, stop)
        assert end.stopped == (cut is not None)
        met += end.stopped
    assert 70 < met < 400


@pytest.mark.parametrize("kind", ["bytes", "byte fallback"])
def test_tokens_before_a_stop_string_at_random(kind):
    """They are those of which the first byte is before it."""
    tokenizer = byte_fallback() if kind == "byte fallback" else byte_level()
    rng, met = random.Random(2), 0
    for _ in range(1500):
        letters = rng.choices("oed,é€😀", k=rng.randrange(1, 4))
        tokens = tokenizer.encode("".join(rng.choices(letters, k=rng.randrange(1, 9))))
        stop = "".join(rng.choices(letters, k=rng.randrange(1, 3)))
        text = decoded(tokenizer, [], tokens)
        _, end = stream(tokenizer, [], tokens, [stop])
        sizes = [1] * len(tokens)
        if kind == "byte fallback":
            sizes = [token_size(tokenizer, token) for token in tokens]
            sizes[0] = 0  # the space before the text is none of it
        before = len(text.partition(stop)[0].encode())
        assert end.num_final_tokens == sum(sum(sizes[:i]) < before for i in range(len(tokens)))
        met += end.stopped
    assert 200 < met < 1300


@pytest.mark.parametrize(
    ("text", "stop", "num_final_tokens"),
    [
        (b"abc", ["x"], [1, 2, 3, 3]),
        (b"ab\n\nc", ["\n\n"], [1, 2, 2, 2, 2, 2]),
        (b"a\nb", ["\n\n"], [1, 1, 3, 3]),
        (b"aab", ["ab"], [0, 1, 1, 1]),
        (b"ab", ["abc"], [0, 0, 2]),
        (b"\xc3\xa9!", ["!"], [0, 2, 2, 2]),
        (b"a\xc3\xa9", ["\xe9"], [1, 1, 1, 1]),
        (b"\xe2\x82!", ["!"], [0, 0, 2, 2]),  # one replacement for both bytes
        (b"\xe2\xc3!", ["\ufffd!"], [0, 0, 1, 1]),
        (b"\xff!", ["\ufffd"], [0, 0, 0]),
    ],
)
def test_tokens_that_no_stop_string_can_take_back(text, stop, num_final_tokens):
    tokenizer = byte_level()
    completion, seen = TextStream(tokenizer, [], stop), []
    for byte in text:
        completion.push(byte_token(tokenizer, byte))
        seen.append(completion.num_final_tokens)
    completion.finish()
    assert [*seen, completion.num_final_tokens] == num_final_tokens


def test_byte_tokens_before_a_stop_string():
    """Each character's own bytes, though they come in one run; invalid ones are one each."""
    tokenizer = byte_fallback()
    _, *tokens = tokenizer.encode("😀中é")
    assert len(tokens) == 8  # four, three and one, which has a token of its own
    for stop, count in [("中", 4), ("中é", 4), ("é", 7), ("😀", 0), ("x", 8)]:
        assert stream(tokenizer, [], tokens, [stop])[1].num_final_tokens == count
    broken = [*tokens[:3], tokens[-1]]
    for stop, count in [("é", 3), ("\ufffdé", 2), ("\ufffd", 0)]:
        assert stream(tokenizer, [], broken, [stop])[1].num_final_tokens == count
    # A run that began in the prompt.
    assert stream(tokenizer, tokens[:4], tokens[4:], ["é"])[1].num_final_tokens == 3


@pytest.mark.parametrize(
    ("text", "stop", "deltas"),
    [
        ("abc", ["x"], ["a", "b", "c", ""]),
        ("ab\n\nc", ["\n\n"], ["a", "b", "", "", "", ""]),
        ("a\nb", ["\n\n"], ["a", "", "\nb", ""]),
        ("aab", ["ab"], ["", "a", "", ""]),
        ("aac", ["aab"], ["", "", "aac", ""]),
        ("ababa", ["abac"], ["", "", "", "ab", "", "aba"]),
        ("xabz", ["ab", "abc"], ["x", "", "", "", ""]),
        ("abcd", ["abcd", "bc"], ["", "", "", "", ""]),
        ("abce", ["abcd", "bc"], ["", "", "", "a", ""]),
        ("abc", ["abcd", "bc"], ["", "", "", "a"]),
        ("é!", ["é!"], ["", "", "", ""]),
    ],
)
def test_what_a_stop_string_holds_back(text, stop, deltas):
    tokenizer = build_tokenizer("bytes", [])
    given, end = stream(tokenizer, [], tokenizer.encode(text), stop)
    assert given == deltas
    assert end.stopped == ("".join(deltas) != text)


def test_a_stop_string_is_met_at_once():
    tokenizer = build_tokenizer("bytes", [])
    text = TextStream(tokenizer, tokenizer.encode("a"), ["ab", "b"])
    assert [text.push(token) for token in tokenizer.encode("b")] == [""]
    assert text.stopped
    assert (text.push(5), text.finish()) == ("", "")


@pytest.mark.parametrize("text", slow_but(["Hello world ", "\ufffd", "😀", "\n"], "\ufffd"))
def test_time_grows_with_the_length_only(tokenizer, text):
    tokens = (tokenizer.encode(text) * 4000)[:4000]

    def seconds(count):
        start = time.process_time()
        stream(tokenizer, [1], tokens[:count], ["Hello there", "\n\n\n\nx"])
        return time.process_time() - start

    assert min(seconds(4000) for _ in range(2)) < 16 * min(seconds(500) for _ in range(4))
