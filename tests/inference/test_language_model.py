"""Text in, text out, with a model whose texts are bytes."""

import dataclasses
import functools
import inspect
import random
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from inference.models import byte_tokenizer, make_model

import hymba_jax
from hymba_jax.errors import HymbaError
from hymba_jax.inference import LanguageModel, SamplingConfig
from hymba_jax.inference.engine import Engine
from hymba_jax.inference.prompts import encode_prompts
from hymba_jax.tokenizer import Tokenizer

TOKENIZER = byte_tokenizer()
PROMPTS = ["the old dog", "", "Who sat?", "a", "the red hat and the old dog"]
SAMPLED = SamplingConfig(max_new_tokens=20, temperature=1.0, seed=5)
# Of log-probabilities of one text in batches of different shapes, all in float32.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def hymba():
    """With a single layer: test_engine.py has deeper ones."""
    return make_model(layers="W")


@pytest.fixture(scope="module")
def model(hymba):
    return LanguageModel(hymba, TOKENIZER)


@pytest.fixture(scope="module")
def greedy(model):
    """What follows the first prompt, without an end."""
    (completion,) = model.generate(PROMPTS[0], max_new_tokens=30)
    assert len(completion.tokens) == 30
    return completion


def begin(text):
    return [TOKENIZER.bos_id, *TOKENIZER.encode(text)]


@functools.cache
def forward_pass(hymba):
    """The logits of a text by the model's own forward pass, one program for all of them."""
    compiled = jax.jit(lambda tokens: hymba(tokens))

    def logits(tokens):
        padded = np.zeros((1, 160), np.int32)  # which no token before it sees
        padded[0, : len(tokens)] = tokens
        return np.asarray(compiled(padded))[0, : len(tokens)]

    return logits


def forward_log_probs(hymba, tokens):
    """Of each token but the first."""
    log_probs = np.asarray(jax.nn.log_softmax(forward_pass(hymba)(tokens[:-1])))
    return log_probs[np.arange(len(tokens) - 1), tokens[1:]]


def as_tokens(completions):
    return [completion.tokens for completion in completions]


def assert_same(actual, expected):
    """The same continuations, up to the rounding of their log-probabilities."""
    assert [dataclasses.replace(c, log_probs=[]) for c in actual] == [
        dataclasses.replace(c, log_probs=[]) for c in expected
    ]
    for completion, reference in zip(actual, expected, strict=True):
        np.testing.assert_allclose(
            completion.log_probs, reference.log_probs, rtol=0, atol=TOLERANCE
        )


def test_the_likeliest_token_of_the_forward_pass_comes_next(hymba, greedy):
    text = begin(PROMPTS[0]) + greedy.tokens
    likeliest = forward_pass(hymba)(text).argmax(-1)[len(text) - 31 : -1]
    assert greedy.tokens == likeliest.tolist()
    expected = forward_log_probs(hymba, text)[-30:]
    np.testing.assert_allclose(greedy.log_probs, expected, rtol=0, atol=TOLERANCE)
    assert (greedy.index, greedy.sample, greedy.finish_reason) == (0, 0, "length")


def test_a_model_says_what_it_is(hymba, model):
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(hymba)))
    assert repr(model) == (
        f"LanguageModel({count:,} parameters in float32 on cpu, 1 layers, context 512, "
        "vocabulary 259, batch_size 8)"
    )
    int8 = LanguageModel(hymba, TOKENIZER, weights="int8", kv_cache="int8")
    assert repr(int8) == f"{repr(model)[:-1]}, weights int8, kv_cache int8)"


def test_text_is_what_the_tokens_say(greedy):
    assert greedy.text == TOKENIZER.decode(greedy.tokens)


def test_prompts_are_a_string_or_several_or_tokens(model):
    texts = PROMPTS[:3]
    (alone,) = model.generate(texts[0], max_new_tokens=5)
    several = model.generate(texts, max_new_tokens=5)
    assert_same(several[:1], [alone])
    assert [completion.index for completion in several] == [0, 1, 2]
    tokens = [begin(text) for text in texts]
    assert model.generate(tokens, max_new_tokens=5) == several
    assert model.generate([tokens[0], texts[1], tuple(tokens[2])], max_new_tokens=5) == several


@pytest.mark.parametrize(
    "given",
    [
        lambda tokens: (row for row in tokens),
        lambda tokens: [np.array(row, np.uint16) for row in tokens],
        lambda tokens: np.array(tokens),
        lambda tokens: [iter(tokens[0]), range(97, 100)],
        lambda tokens: tuple(jnp.array(row) for row in tokens),
        lambda tokens: [[np.int64(token) for token in tokens[0]], tuple(tokens[1])],
    ],
)
def test_prompts_may_be_any_iterable(model, given):
    tokens = [[1, 70, 80], [97, 98, 99]]
    assert model.encode(given(tokens)) == tokens


def test_strings_may_be_any_iterable(model):
    texts = ["a", "the old"]
    expected = [begin(text) for text in texts]
    for given in (iter(texts), tuple(texts), np.array(texts), dict.fromkeys(texts).keys()):
        assert model.encode(given) == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts are None, not a string or a list of strings or of lists of tokens"),
        (7, "prompts are 7, not a string"),
        (b"abc", "prompts are bytes, which must be decoded first, not a string"),
        ({"prompt": "a"}, "prompts are of type dict, not a string"),
        (iter(()), "there are no prompts"),
        (
            [1, 70],
            "prompt 1 is 1, neither a string nor a list of tokens (a prompt of tokens",
        ),
        (np.array([1, 70]), "prompt 1 is 1, neither a string nor a list of tokens"),
        (["a", None], "prompt 2 is None, neither a string nor a list of tokens"),
        (["a", b"b"], "prompt 2 is bytes, which must be decoded first, neither a string"),
        ([{"prompt": "a"}], "the prompt is of type dict, neither a string nor a list of tokens"),
        ([[1, 2.0]], "the prompt: token 2 is 2.0, not an integer"),
        ([np.array([1.0])], "the prompt: token 1 is 1.0, not an integer"),
        ([jnp.array([1.5])], "the prompt: token 1 is 1.5, not an integer"),
        ([[1, True]], "the prompt: token 2 is True, not an integer"),
        ([[1, None]], "the prompt: token 2 is None, not an integer"),
        ([["a", "b"]], "the prompt: token 1 is of type str, not an integer"),
        ([[[1, 2]]], "the prompt: token 1 is of type list, not an integer"),
        ([np.array([[1, 2]])], "the prompt: token 1 is of type ndarray, not an integer"),
        (["a", np.array(5)], "prompt 2 is of type ndarray, neither a string nor a list of tokens"),
    ],
)
def test_what_is_no_prompt(prompts, message):
    assert refusal(encode_prompts, prompts, TOKENIZER, 259, 512, 1).startswith(message)


def test_stop_may_be_one_string(model, plain):
    prompt, free = plain
    asked = {"max_new_tokens": np.int32(40), "stop_tokens": np.array([5])}
    (one,) = model.generate(prompt, stop=free.text[2:5], **asked)
    assert [one] == model.generate(prompt, stop=[free.text[2:5]], **asked)
    assert one.text == free.text[:2]


@pytest.fixture(scope="module")
def plain(model):
    """A prompt and what follows it, whose first five tokens are characters."""
    for prompt in string.ascii_letters:
        (free,) = model.generate(prompt, max_new_tokens=40)
        if free.text[:5].isascii():
            return prompt, free
    raise AssertionError


@pytest.fixture(scope="module")
def wide():
    """A model with room for more tokens than the tokenizer has, and untied embeddings."""
    return make_model(layers="W", vocab_size=320, tie_embeddings=False)


def test_tokens_that_the_tokenizer_lacks_are_never_sampled(wide):
    model = LanguageModel(wide, TOKENIZER)
    new = 60
    for sampling in ({}, {"temperature": 1.0}, {"temperature": 1e30, "repetition_penalty": 3.0}):
        (completion,) = model.generate("a", max_new_tokens=new, **sampling)
        assert all(0 <= token < 259 for token in completion.tokens)
    # They would have been: of 320 rows, 61 are more.
    (completion,) = model.generate("a", max_new_tokens=new)
    text = begin("a") + completion.tokens
    logits = forward_pass(wide)(text[:-1])
    assert logits[1:].argmax(-1).max() >= 259
    assert completion.tokens == logits[1:, :259].argmax(-1).tolist()
    # Their share is in the log-probabilities, which are the model's own.
    expected = forward_log_probs(wide, text)[1:]
    np.testing.assert_allclose(completion.log_probs, expected, rtol=0, atol=TOLERANCE)
    assert refusal(model.generate, "a", stop_tokens=(300,)).startswith("stop token 300 is not in")


def test_holes_in_the_tokenizers_ids(wide):
    vocabulary = {"<s>": 1, "</s>": 4, "a": 6, "b": 9}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "a"))
    model = LanguageModel(wide, Tokenizer(words, "<s>", "</s>"))
    np.testing.assert_array_equal(np.flatnonzero(model.engine.allowed), [1, 4, 6, 9])


def damaged(model, name, place, value):
    """A copy with one row or column of the embedding or the output overwritten."""
    graph, state = nnx.split(model)
    params = nnx.to_flat_state(state)
    changed = [
        (path, leaf.replace(leaf[...].at[place].set(value)) if name in path else leaf)
        for path, leaf in params
    ]
    return LanguageModel(nnx.merge(graph, nnx.from_flat_state(changed)), TOKENIZER)


def test_logits_that_are_not_finite(wide):
    """At the token that makes them so, in the prompt or among those that were sampled."""
    (free,) = LanguageModel(wide, TOKENIZER).generate("the", max_new_tokens=8)
    prompt = begin("the")
    token = next(t for t in free.tokens[1:] if t not in [*prompt, free.tokens[0]])
    place = len(prompt) + free.tokens.index(token)
    for value in (np.nan, np.inf):
        model = damaged(wide, "embedding", token, value)
        message = f"the model's logits at position {place} are not finite"
        assert refusal(model.generate, "the").startswith(f"the prompt: {message}")
        # Read at once, it spoils the positions before it too: attention gives them none of it,
        # but zero times NaN is NaN.
        message = "prompt 2: the model's logits at position 0 are not finite"
        assert refusal(model.log_probs, ["the", [*prompt, token, 70]]).startswith(message)
        # What ends before is not touched.
        (before,) = model.generate("the", max_new_tokens=place - len(prompt) + 1)
        assert before.tokens == free.tokens[: place - len(prompt) + 1]


def test_an_empty_prompt_is_bos(model):
    assert model.generate([[]], max_new_tokens=5) == model.generate("", max_new_tokens=5)


def test_fields_stand_in_for_those_of_the_config(model, greedy):
    config = SamplingConfig(max_new_tokens=30, temperature=1.0)
    (completion,) = model.generate(PROMPTS[0], config, temperature=0.0)
    assert completion == greedy


@pytest.mark.parametrize("place", [0, 1, 9, 17])
def test_a_stop_token_ends_the_completion_and_is_no_part_of_it(model, greedy, place):
    stop = greedy.tokens[place]
    expected = greedy.tokens[: greedy.tokens.index(stop)]
    (completion,) = model.generate(PROMPTS[0], max_new_tokens=30, stop_tokens=(7, stop))
    assert completion.tokens == expected
    assert completion.log_probs == greedy.log_probs[: len(expected)]
    assert completion.text == TOKENIZER.decode(expected)
    assert completion.finish_reason == "stop"


def test_a_stop_string_that_is_a_control_token_ends_the_completion(hymba, model, greedy):
    stop = greedy.tokens[9]
    tokenizer = byte_tokenizer().model
    name = tokenizer.id_to_token(stop)
    tokenizer.add_special_tokens([name])  # so that no text shows it
    stopping = LanguageModel(hymba, Tokenizer(tokenizer, "<s>", "</s>"))
    prompts = [begin(PROMPTS[0])]
    (completion,) = stopping.generate(prompts, max_new_tokens=30, stop=(name, "never"))
    assert completion.tokens == greedy.tokens[: greedy.tokens.index(stop)]
    assert completion.finish_reason == "stop"


def test_a_stop_string_that_cannot_come_is_refused(model):
    with pytest.raises(HymbaError, match="combines the special token </s> with other text"):
        model.stream("a", stop="</s>\n")


def test_control_tokens_in_prompts(model):
    text = TOKENIZER.encode("a</s>")
    assert model.encode("a</s>") == [[TOKENIZER.bos_id, *text]]
    parsed = [TOKENIZER.bos_id, *text[:1], TOKENIZER.eos_id]
    assert model.encode("a</s>", parse_special=True) == [parsed]
    assert model.encode("<s>a</s>", parse_special=True) == [parsed]  # no second one before it
    (expected,) = model.generate([parsed], max_new_tokens=5)
    assert model.generate("<s>a</s>", max_new_tokens=5, parse_special=True) == [expected]


def test_a_conversation_as_a_prompt(hymba):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{{ tools | tojson }}{{ documents[0].text }}{{ mood }}"
    template += "{% if add_generation_prompt %}:{% endif %}"
    model = LanguageModel(hymba, Tokenizer(byte_tokenizer().model, "<s>", "</s>", template))
    options = {"tools": [{"name": "f"}], "documents": [{"text": "</s>"}], "mood": "good"}
    ids = model.encode_chat([{"role": "user", "content": "a<s>"}], **options)
    written = [TOKENIZER.encode(text) for text in ("a<s>", '[{"name": "f"}]</s>good:')]
    assert ids == [TOKENIZER.bos_id, *written[0], TOKENIZER.eos_id, *written[1]]
    assert model.encode_chat([], **options, add_generation_prompt=False)[-1] != ids[-1]


def test_no_token_to_begin_with(hymba):
    model = LanguageModel(hymba, Tokenizer(byte_tokenizer().model, None, "</s>"))
    assert model.encode("ab") == [TOKENIZER.encode("ab")]
    with pytest.raises(HymbaError, match="the prompt is empty, and the tokenizer has no token to"):
        model.encode("")


def test_the_end_of_sequence_token_ends_the_completion(hymba, greedy):
    model = LanguageModel(hymba, TOKENIZER)
    model.config = dataclasses.replace(model.config, eos_token_id=greedy.tokens[12])
    (completion,) = model.generate(PROMPTS[0], max_new_tokens=30)
    assert completion.tokens == greedy.tokens[: greedy.tokens.index(greedy.tokens[12])]
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("interval", [1, 5, 16])
def test_a_stop_string_ends_the_completion_wherever_tokens_are_cut(model, plain, interval):
    prompt, free = plain
    text, stop = free.text[:2], free.text[2:5]
    deltas = [
        *model.stream(prompt, max_new_tokens=40, stream_interval=interval, stop=("never", stop))
    ]
    assert "".join(delta.text for delta in deltas) == text
    assert [token for delta in deltas for token in delta.tokens] == free.tokens[:2]
    log_probs = [value for delta in deltas for value in delta.log_probs]
    np.testing.assert_allclose(log_probs, free.log_probs[:2], rtol=0, atol=TOLERANCE)
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]


def test_stopping_does_not_affect_other_rows(model, greedy):
    prompts = [PROMPTS[2], PROMPTS[0], PROMPTS[3]]
    free = model.generate(prompts, max_new_tokens=30)
    stop = next(token for token in greedy.tokens if token not in free[0].tokens)
    completions = model.generate(prompts, max_new_tokens=30, stop_tokens=(stop,))
    assert completions[1].finish_reason == "stop"
    others = [i for i in (0, 2) if stop not in free[i].tokens]
    assert all(completions[i] == free[i] for i in others)


def test_the_context_ends_a_completion(hymba, greedy):
    model, text = LanguageModel(hymba, TOKENIZER, context=32), begin(PROMPTS[0]) + greedy.tokens
    for room in (1, 2, 20):
        (completion,) = model.generate([text[: 32 - room]], max_new_tokens=30)
        assert completion.tokens == text[32 - room : 32]
        assert (completion.finish_reason, completion.context_full) == ("length", True)
    stop = (text[31],)
    for new, reason, full in [(2, "length", False), (3, "length", True), (30, "stop", False)]:
        (completion,) = model.generate(
            [text[:30]], max_new_tokens=new, stop_tokens=stop if new == 30 else ()
        )
        assert (completion.finish_reason, completion.context_full) == (reason, full)


@pytest.mark.parametrize("interval", [1, 3, 16])
def test_deltas_make_up_the_completion(model, greedy, interval):
    asked = (PROMPTS[:3], dataclasses.replace(SAMPLED, num_samples=2))
    whole = model.generate(*asked, stop_tokens=(greedy.tokens[5],))
    deltas = [*model.stream(*asked, stream_interval=interval, stop_tokens=(greedy.tokens[5],))]
    for completion in whole:
        own = [p for p in deltas if (p.index, p.sample) == (completion.index, completion.sample)]
        assert "".join(delta.text for delta in own) == completion.text
        assert [token for delta in own for token in delta.tokens] == completion.tokens
        log_probs = [log_prob for delta in own for log_prob in delta.log_probs]
        assert log_probs == completion.log_probs
        assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == completion.finish_reason
        sampled = len(completion.tokens) + (completion.finish_reason == "stop")
        assert len(own) in (1 + -(-(sampled - 1) // interval), -(-sampled // interval))


def test_the_first_delta_comes_before_the_rest_is_sampled(model, monkeypatch):
    monkeypatch.setattr(model.engine, "decode", None)
    deltas = model.stream("the", SAMPLED)
    assert next(deltas).finish_reason is None
    with pytest.raises(TypeError):
        next(deltas)


def test_samples_come_in_order_and_differ(model):
    config = dataclasses.replace(SAMPLED, num_samples=3)
    completions = model.generate(PROMPTS[:3], config)
    places = [(i, sample) for i in range(3) for sample in range(3)]
    assert [(c.index, c.sample) for c in completions] == places
    assert len({tuple(tokens) for tokens in as_tokens(completions)}) == len(places)
    fewer = model.generate(PROMPTS[:3], dataclasses.replace(config, num_samples=2))
    assert_same(fewer, [c for c in completions if c.sample < 2])


def test_a_sample_depends_on_its_seed_and_not_on_the_batch(model):
    together = model.generate(PROMPTS, SAMPLED)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = model.generate(prompt, SAMPLED)
        assert_same([alone], [dataclasses.replace(together[i], index=0)])
    other = model.generate(PROMPTS, dataclasses.replace(SAMPLED, seed=6))
    assert all(a != b for a, b in zip(as_tokens(other), as_tokens(together), strict=True))


def test_more_prompts_than_a_batch_come_back_in_order(hymba, model):
    prompts = [*PROMPTS, "the " * 7, "ran"]
    expected = as_tokens(model.generate(prompts, SAMPLED))
    small = LanguageModel(hymba, TOKENIZER, batch_size=3)
    for seed in range(2):
        order = random.Random(seed).sample(range(len(prompts)), len(prompts))
        completions = small.generate([prompts[i] for i in order], SAMPLED)
        assert [completion.index for completion in completions] == [*range(len(prompts))]
        assert as_tokens(completions) == [expected[i] for i in order]


def test_log_probs_are_those_of_the_forward_pass(hymba):
    texts = ["the old dog ran", "", "a", "x" * 150, begin("Who sat? The dog"), [42], []]
    small = LanguageModel(hymba, TOKENIZER, batch_size=3)
    log_probs = small.log_probs(texts)
    assert [len(scores) for scores in log_probs] == [15, 0, 1, 150, 16, 0, 0]
    for i in (0, 3, 4):
        tokens = texts[i] if isinstance(texts[i], list) else begin(texts[i])
        expected = forward_log_probs(hymba, tokens)
        np.testing.assert_allclose(log_probs[i], expected, rtol=0, atol=TOLERANCE)


def test_a_text_as_long_as_the_context_has_log_probs_but_no_continuation(hymba):
    model = LanguageModel(hymba, TOKENIZER, context=32)
    assert len(model.log_probs("x" * 31)[0]) == 31
    with pytest.raises(HymbaError, match="32 tokens do not fit the model's context of 32"):
        model.generate("x" * 31)
    with pytest.raises(HymbaError, match="33 tokens do not fit the model's context of 32"):
        model.log_probs("x" * 32)


def refusal(function, *args, **kwargs):
    """The one line that says what is wrong."""
    with pytest.raises(HymbaError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are no prompts"),
        ("x" * 512, "the prompt: 513 tokens do not fit the model's context of 512"),
        (["a", "x" * 600], "prompt 2: 601 tokens do not fit the model's context of 512"),
        (["a", "b", [1, 259]], "prompt 3: token 259 is outside the vocabulary of 259"),
        ([[5, -1]], "the prompt: token -1 is outside the vocabulary of 259"),
        ("\udcff", "'\\udcff' is not valid Unicode: it has bytes that are not UTF-8"),
    ],
)
def test_impossible_prompts(model, prompts, message):
    for function in (model.generate, model.stream):
        assert refusal(function, prompts).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "sampling: max_new_tokens is 0, not between 1 and 2147483647"),
        ({"temperature": -1.0}, "sampling: temperature is -1.0, not 0 or between"),
        ({"stop": ("a", "")}, "sampling: stop is ('a', ''), not a list of non-empty strings"),
        (
            {"top_p": 0.0, "num_samples": 0},
            "sampling: top_p is 0.0, not in (0, 1]; num_samples is 0, not between 1 and 1048576",
        ),
        ({"top_p": 0.9}, "sampling: top_p 0.9 has no effect at temperature 0"),
        (
            {"stop_tokens": (5, 259)},
            "stop token 259 is not in the tokenizer, so it is never sampled",
        ),
    ],
)
def test_impossible_sampling_values(model, values, message):
    for function in (model.generate, model.stream):
        assert refusal(function, "a", **values).startswith(message)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("temprature", "unknown option temprature: did you mean temperature?"),
        ("max_tokens", "unknown option max_tokens: did you mean max_new_tokens?"),
        ("xyz", "unknown option xyz: there are max_new_tokens, temperature, "),
        ("tokenizer", "unknown option tokenizer: there are"),
        ("dtype", "dtype is set when a model is loaded (hymba_jax.load), not here"),
        ("speculate", "speculate is set when a model is loaded (hymba_jax.load), not here"),
    ],
)
def test_sampling_values_that_do_not_exist(model, option, message):
    for function in (model.generate, model.stream):
        assert refusal(function, "a", **{option: 1}).startswith(message)


def test_options_of_load_are_not_those_of_generate(model):
    for option in inspect.signature(hymba_jax.load).parameters.keys() - {"directory"}:
        message = f"{option} is set when a model is loaded (hymba_jax.load), not here"
        assert refusal(model.generate, "a", **{option: 1}) == message


def test_generate_has_no_distance_between_deltas(model):
    message = refusal(model.generate, "a", stream_interval=4)
    assert message.startswith("unknown option stream_interval: there are")


@pytest.mark.parametrize("interval", [-1, 0, 17])
def test_impossible_distances_between_deltas(model, interval):
    assert (
        refusal(model.stream, "a", stream_interval=interval)
        == f"stream_interval is {interval}, not between 1 and 16"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, not at least 1"),
        ({"max_chunk": 0}, "max_chunk is 0, not at least 1"),
        ({"prefix_states": -1}, "prefix_states is -1, not at least 0"),
        ({"context": 10**12}, f"a context of {10**12} tokens: the model's is 1 to 512"),
        ({"context": 0}, "a context of 0 tokens: the model's is 1 to 512"),
        ({"context": 513}, "a context of 513 tokens: the model's is 1 to 512 (max_positions)"),
    ],
)
def test_impossible_models(hymba, options, message):
    assert refusal(LanguageModel, hymba, TOKENIZER, **options).startswith(message)


def test_a_state_dtype_that_does_not_exist(hymba):
    """Without the tests' own checks of annotations, which refuse it first."""
    init = inspect.unwrap(Engine.__init__)
    message = refusal(init, object.__new__(Engine), hymba, state_dtype="int8")
    assert message == "state_dtype is 'int8', not one of float32, bfloat16"


def test_options_of_the_wrong_type(hymba):
    """Without the tests' own checks of annotations, as before."""
    init = inspect.unwrap(LanguageModel.__init__)
    model = object.__new__(LanguageModel)
    message = refusal(init, model, hymba, TOKENIZER, speculate="yes")
    assert message == "speculate is 'yes', not true or false"


def test_states_are_kept_after_short_chunks(hymba):
    """Else none would be of prompts that are shorter than a chunk."""
    for options, chunk in (({}, 1024), ({"prefix_states": 1}, 64)):
        assert LanguageModel(hymba, TOKENIZER, **options).engine.max_chunk == chunk
    model = LanguageModel(hymba, TOKENIZER, context=128, prefix_states=1)
    for _ in range(2):
        model.generate("x" * 80, max_new_tokens=1)
    (_, prefixes) = model._prefix_cache
    assert prefixes.hit_tokens == 64


def test_a_replica_keeps_states_of_its_own(hymba):
    """Those of the original are on another device."""
    model = LanguageModel(hymba, TOKENIZER, context=64, max_chunk=32, prefix_states=1)
    model = model.on_device(jax.devices()[1])  # where its arrays are committed
    expected = model.generate("x" * 40, max_new_tokens=3)
    replica = model.on_device(jax.devices()[2])
    for each in (replica, model):
        assert each.generate("x" * 40, max_new_tokens=3) == expected
