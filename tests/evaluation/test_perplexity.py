"""Perplexity against a softmax in double precision over logits of the full forward pass."""

import dataclasses
import gzip
import json
import math
import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inference.models import byte_tokenizer, make_model
from slow import slow_but

from hymba_jax import cli, evaluation
from hymba_jax.checkpoint.save import save_model
from hymba_jax.config.adapter import AdapterConfig
from hymba_jax.convert.peft import write_peft
from hymba_jax.data.conversations import Conversations
from hymba_jax.data.documents import read_documents
from hymba_jax.data.listing import list_files
from hymba_jax.data.records import Document
from hymba_jax.errors import HymbaError
from hymba_jax.evaluation.documents import encode_documents
from hymba_jax.evaluation.perplexity import PositionSums, score_documents
from hymba_jax.evaluation.replicas import Replicas
from hymba_jax.evaluation.statistics import Totals, by_position, estimates
from hymba_jax.evaluation.windows import windows
from hymba_jax.inference import LanguageModel
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.model import Hymba, merge_adapters
from hymba_jax.tokenizer import Tokenizer, build_tokenizer
from hymba_jax.tokenizer.control_tokens import TEMPLATE

TEXTS = {
    "short.txt": "Grüße, 世界! 🌍",
    "control.txt": "</s> and <s> are text",
    "long.txt": "the old dog sat on the red mat; " * 5,
    "a.txt": "x",
}
WINDOW, STRIDE = 60, 20
# Of cross entropy, in nats: logits are computed in float32, in batches of different shapes.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def hymba():
    return make_model(layers="W")


@pytest.fixture(scope="module")
def model(hymba):
    return LanguageModel(hymba, byte_tokenizer(), batch_size=4)


@pytest.fixture(scope="module")
def full_forward(hymba):
    """The nats of each token but the first, given those before it, from float64 softmax."""
    forward = jax.jit(lambda tokens: hymba(tokens))

    def nats(tokens):
        padded = np.zeros((1, 128), np.int32)  # causal: what is behind a token does not matter
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(jnp.asarray(padded)), np.float64)[0, : len(tokens) - 1]
        log_z = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        return log_z - logits[np.arange(len(tokens) - 1), tokens[1:]]

    return nats


def encoded(texts=TEXTS):
    documents = (Document(name, text) for name, text in texts.items())
    return [*encode_documents(documents, byte_tokenizer())]


class TestWindows:
    @pytest.mark.parametrize("stride", [1, 3, 4])
    @pytest.mark.parametrize("num_tokens", [0, 1, 2, 4, 5, 6, 9, 14])
    def test_each_token_is_scored_once_with_its_context(self, num_tokens, stride):
        scored = []
        for start, stop, first in windows(num_tokens, 4, stride):
            assert stop - start <= 5  # 4 tokens of context for the last one
            for token in range(first, stop):
                scored.append(token)
                assert token - start == token or token - start > 4 - stride
        assert scored == [*range(1, num_tokens)]


class TestScores:
    def test_they_equal_the_full_forward_pass(self, model, full_forward):
        documents = encoded()
        scores, _ = score_documents(model, documents, WINDOW, STRIDE)
        for document, score in zip(documents, scores, strict=True):
            tokens = document.tokens.tolist()
            expected = [
                full_forward(tokens[max(0, stop - 1 - WINDOW) : stop])[-(stop - first) :]
                for first, stop in _scored(len(tokens))
            ]
            np.testing.assert_allclose(score.nats, np.concatenate(expected), atol=TOLERANCE)
            assert score.text_bytes.sum() == len(TEXTS[document.name].encode())

    def test_the_curve_has_all_tokens_of_all_windows(self, model, full_forward):
        document = encoded({"long": TEXTS["long.txt"]})
        _, sums = score_documents(model, document, WINDOW, STRIDE)
        tokens, nats, counts = document[0].tokens.tolist(), np.zeros(WINDOW), np.zeros(WINDOW)
        for _, stop in _scored(len(tokens)):
            part = full_forward(tokens[max(0, stop - 1 - WINDOW) : stop])
            nats[: len(part)] += part
            counts[: len(part)] += 1
        np.testing.assert_allclose(sums.nats, nats, atol=TOLERANCE * counts.max())
        assert sums.tokens.tolist() == counts.tolist() == sums.text_bytes.tolist()

    def test_they_do_not_depend_on_batch_size_and_order(self, hymba, model):
        expected, sums = score_documents(model, encoded(), WINDOW, STRIDE)
        alone = LanguageModel(hymba, byte_tokenizer(), batch_size=1)
        reverse, other_sums = score_documents(alone, encoded()[::-1], WINDOW, STRIDE)
        for score, other in zip(expected, reverse[::-1], strict=True):
            assert score.name == other.name
            np.testing.assert_allclose(score.nats, other.nats, atol=TOLERANCE)
        np.testing.assert_allclose(sums.nats, other_sums.nats, rtol=TOLERANCE)

    def test_they_have_the_same_bits_on_several_devices(self, hymba, model):
        """Three of them, whose last batches are fewer."""
        expected, sums = score_documents(model, encoded(), WINDOW, STRIDE)
        model = LanguageModel(hymba, byte_tokenizer(), batch_size=4)
        replicas = Replicas(model, jax.devices()[1:4])
        actual, other_sums = score_documents(model, encoded(), WINDOW, STRIDE, replicas=replicas)
        for score, other in zip(expected, actual, strict=True):
            assert score.name == other.name
            np.testing.assert_array_equal(score.nats, other.nats)
        np.testing.assert_array_equal(sums.nats, other_sums.nats)

    def test_logits_that_are_not_finite_are_an_error(self):
        broken = make_model(layers="W", num_meta_tokens=0)
        embedding = np.array(broken.embedding[...])
        embedding[byte_tokenizer().encode("q")] = np.nan
        broken.embedding[...] = embedding
        broken = LanguageModel(broken, byte_tokenizer())
        with pytest.raises(HymbaError, match=r"b\.txt: the model's logits for token 1 are not"):
            score_documents(broken, encoded({"b.txt": "aaq"}), WINDOW, STRIDE)


def _scored(num_tokens):
    """The ranges of tokens that are scored from one window: the rule, written once more."""
    edges = [1, min(num_tokens, WINDOW + 1)]
    while edges[-1] < num_tokens:
        edges.append(min(num_tokens, edges[-1] + STRIDE))
    return [(first, stop) for first, stop in pairwise(edges) if first < stop]


class TestDocuments:
    def test_a_document_begins_with_bos_and_has_no_control_tokens(self):
        tokenizer = byte_tokenizer()
        control = encoded()[1]
        assert control.tokens.tolist() == [
            tokenizer.bos_id,
            *tokenizer.encode("</s> and <s> are text"),
        ]
        assert not {tokenizer.bos_id, tokenizer.eos_id} & {*control.tokens[1:].tolist()}
        assert control.is_scored.tolist() == [False] + [True] * 21

    def test_bytes_of_tokens_that_share_a_character(self):
        (document,) = encoded({"a": "aü🌍b"})
        assert document.text_bytes.tolist() == [0, 1, 2, 0, 4, 0, 0, 0, 1]

    def test_bytes_of_a_bpe_are_those_of_its_tokens(self):
        text = "the old dog — the red hat\n" * 4
        tokenizer = build_tokenizer("bpe:280", [text])
        (document,) = encode_documents([Document("a", text)], tokenizer)
        decoded = [tokenizer.decode([token]) for token in document.tokens]
        ascii_tokens = [i for i, token in enumerate(decoded) if token.isascii()]
        expected = [len(decoded[i]) for i in ascii_tokens]
        assert document.text_bytes[ascii_tokens].tolist() == expected
        assert document.text_bytes.sum() == len(text.encode())
        assert len(document.tokens) < len(text)

    def test_pieces_of_a_long_document_are_joined(self):
        pieces = [Document("a", "one ", continues=True), Document("a", "two"), Document("b", "x")]
        joined = [*encode_documents(pieces, byte_tokenizer())]
        assert [document.name for document in joined] == ["a", "b"]
        assert joined[0].tokens.tolist() == encoded({"a": "one two"})[0].tokens.tolist()
        assert joined[0].text_bytes.tolist() == [0] + [1] * 7

    def test_without_bos_the_first_token_is_not_scored(self):
        tokenizer = Tokenizer(byte_tokenizer().model, None, "</s>")
        (document,) = encode_documents([Document("a", "xyz")], tokenizer)
        assert document.is_scored.tolist() == [False, True, True]

    @pytest.mark.parametrize("begin", ["<s>", ""])
    def test_of_a_conversation_answers_are_scored(self, tmp_path, begin):
        """Its tokens are those that the template writes, as in training and generation."""
        template = (
            f"{{% for m in messages %}}{{{{ '{begin}' if m.role == 'user' else '' }}}}"
            "{{ m.content }}{{ '</s>' if m.role == 'assistant' else '' }}{% endfor %}"
        )
        tokenizer = Tokenizer(byte_tokenizer().model, "<s>", "</s>", template)
        line = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Ho"}]
        (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": line}))
        content = Conversations(tokenizer, "all", "template")
        records = read_documents(list_files(str(tmp_path)).files, content)
        (document,) = encode_documents(records, tokenizer)
        question, answer = (
            tokenizer.encode_traced(text, bytes([TEMPLATE]) * len(text))
            for text in (begin + "Hi ", "Ho</s>")
        )
        assert document.tokens.tolist() == [*question, *answer]
        assert document.tokens[document.is_scored].tolist() == answer
        assert (document.tokens[0] == tokenizer.bos_id) == bool(begin)
        assert document.text_bytes.sum() == 0


class TestStatistics:
    def test_means_are_over_tokens_and_bytes(self):
        documents = [Totals(4.0, 2, 8), Totals(20.0, 4, 4)]
        means = estimates(documents, 0)
        assert means.nats_per_token.value == 4.0
        assert means.perplexity.value == math.exp(4.0)
        assert means.bits_per_byte.value == pytest.approx(2 / math.log(2), rel=1e-15)

    def test_errors_are_those_of_means_of_normal_numbers(self):
        """Of n documents of one length, the error of the mean is sigma / sqrt(n)."""
        rng = np.random.default_rng(0)
        documents = [Totals(float(nats), 10, 10) for nats in rng.normal(50, 5, 400)]
        error = estimates(documents, 0).nats_per_token.standard_error
        assert error is not None
        assert error == pytest.approx(0.5 / math.sqrt(400), rel=0.1)  # 1000 resamples: about 3%
        assert estimates(documents, 0) == estimates(documents, 0)
        assert estimates(documents, 1).nats_per_token.standard_error != error

    def test_nothing_is_known_of_one_document_or_no_bytes(self):
        means = estimates([Totals(4.0, 2, 0)], 0)
        assert dataclasses.astuple(means.bits_per_byte) == (None, None)
        assert means.nats_per_token.standard_error is None

    def test_spans_of_positions(self):
        sums = PositionSums(
            np.array([1.0, 2.0, 4.0, 0.0, 0.0, 0.0, 5.0]),
            np.array([2, 1, 1, 0, 0, 0, 1]),
            np.array([2, 1, 3, 0, 0, 0, 2]),
        )
        spans = by_position(sums, 2)
        assert [(span.start, span.stop) for span in spans] == [(1, 3), (3, 5), (7, 8)]
        expected = [(3.0, 3, 3), (4.0, 1, 3), (5.0, 1, 2)]
        assert [dataclasses.astuple(span.totals) for span in spans] == expected


@pytest.fixture(scope="module")
def directory(hymba, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "model"
    save_model(directory, hymba, byte_tokenizer())
    return directory


class TestCommand:
    def test_it_writes_what_the_scores_are(self, model, directory, tmp_path, capsys):
        """Of JSON lines, compressed, with a field of another name."""
        lines = [json.dumps({"body": text}) for text in TEXTS.values()]
        (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        output, image = tmp_path / "out.json", tmp_path / "out.png"
        arguments = f"--data.path {tmp_path / 'texts.jsonl.gz'} --data.text-field body --limit 3"
        sizes = f"--window {WINDOW} --stride {STRIDE} --span 16 --batch-size 4"
        command = (
            f"evaluate --model {directory} {arguments} {sizes} --output {output} --image {image}"
        )
        cli.main(command.split())
        assert "bits per byte" in capsys.readouterr().out
        result = json.loads(output.read_text())
        scores, sums = score_documents(model, encoded()[:3], WINDOW, STRIDE)
        nats = sum(score.nats.sum(dtype=np.float64) for score in scores)
        num_bytes = sum(len(text.encode()) for text in [*TEXTS.values()][:3])
        assert result["bits_per_byte"]["value"] == pytest.approx(
            nats / math.log(2) / num_bytes, rel=TOLERANCE
        )
        assert (result["documents"], result["text_bytes"]) == (3, num_bytes)
        assert [row["name"] for row in result["by_document"]] == [
            f"texts.jsonl.gz:{i}" for i in (1, 2, 3)
        ]
        assert [row["start"] for row in result["by_position"]] == [1, 17, 33, 49]
        assert result["by_position"][0]["tokens"] == sums.tokens[:16].sum()
        assert image.read_bytes().startswith(b"\x89PNG")

    def test_the_step_is_that_of_the_model(self, model, tmp_path, monkeypatch):
        """Of a run that writes another checkpoint while this one is evaluated."""
        newest, loaded = iter([10, 20]), []
        monkeypatch.setattr("hymba_jax.evaluation.command.loaded_step", lambda *_: next(newest))
        monkeypatch.setattr(ModelChoice, "load", lambda self: loaded.append(self.step) or model)
        (tmp_path / "a.txt").write_text("text")
        output = tmp_path / "out.json"
        command = f"evaluate --model run --data.path {tmp_path / 'a.txt'} --output {output}"
        cli.main(command.split())
        assert loaded == [json.loads(output.read_text())["step"]] == [10]

    @pytest.mark.parametrize("dtype", slow_but(["float32", "bfloat16"], "bfloat16"))
    def test_an_adapter_is_merged(self, hymba, directory, tmp_path, dtype):
        """Into float32 values; bfloat16 then has 8 bits of each number."""
        adapter = AdapterConfig(kind="lora", rank=2)
        adapted = Hymba(hymba.config, hymba.compute, nnx.Rngs(0), adapter)
        nnx.update(adapted, nnx.state(hymba))
        rng = np.random.default_rng(1)
        for path, leaf in nnx.to_flat_state(nnx.state(adapted)):
            if "adapter" in path:
                leaf[...] += 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
        params = nnx.to_pure_dict(nnx.state(adapted))
        (tmp_path / "adapter").mkdir()
        write_peft(
            tmp_path / "adapter", params, hymba.config, adapter, scan_layers=False, base_model=""
        )
        (tmp_path / "a.txt").write_text(TEXTS["long.txt"])
        output = tmp_path / "out.json"
        command = f"evaluate --model {directory} --adapter {tmp_path / 'adapter'} --dtype {dtype}"
        cli.main(f"{command} --data.path {tmp_path / 'a.txt'} --output {output}".split())
        result = json.loads(output.read_text())
        assert (result["dtype"], result["adapter"]) == (dtype, str(tmp_path / "adapter"))
        document = encoded({"long": TEXTS["long.txt"]})
        means = [
            score_documents(LanguageModel(each, byte_tokenizer()), document, 512, 256)[0]
            for each in (merge_adapters(adapted), hymba)
        ]
        merged, base = (float(scores[0].nats.mean(dtype=np.float64)) for scores in means)
        tolerance = {"float32": TOLERANCE, "bfloat16": 0.02}[dtype]
        assert result["nats_per_token"]["value"] == pytest.approx(merged, rel=tolerance)
        assert abs(base / merged - 1) > 0.1  # the adapter matters

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("", "give either data.path"),
            ("--data.path {texts} --tasks piqa", "give either data.path"),
            ("--data.path {texts} --answers a.jsonl", "answers has no effect on data"),
            ("--tasks piqa --window 8", "window has no effect on tasks"),
            ("--tasks piqa --data.format chat", "data has no effect without data.path"),
            ("--needle.lengths 64 --data.text-field a", "data has no effect without data.path"),
            (
                "--data.path {texts} --window 600",
                "window is 600 tokens, the model's context is 512",
            ),
            ("--data.path {texts} --window 8 --stride 9", "stride is 9, more than the window of 8"),
            ("--data.path {texts} --image a.jpx", r"a.jpx: an image ends in .png"),
            ("--data.path {texts} --output /no/where.json", "there is no directory /no"),
            (
                "--data.path {texts} --output a.png --image ./a.png",
                "and answers name the same file",
            ),
            ("--tasks piqa --output a --answers a", "name the same file: give each"),
            ("--data.path {texts} --data.loss-on last", "data.loss_on has no effect on text"),
            (
                "--data.path {texts} --data.text-field body",
                "data.text_field body has no effect: .* has text, and neither JSON nor Parquet",
            ),
            (
                "--data.path {texts} --data.format chat --data.text-field body",
                "data.text_field has no effect on conversations: leave it out",
            ),
            (
                "--data.path {texts} --data.format chat",
                "its tokenizer has no chat template, .*: put that of its training there as",
            ),
            ("--data.path {texts}/nothing", "no such"),
        ],
    )
    def test_errors_are_one_line(self, directory, tmp_path, options, message):
        (tmp_path / "a.txt").write_text("text")
        arguments = options.format(texts=tmp_path).split()
        with pytest.raises(SystemExit, match=message) as error:
            cli.main(["evaluate", "--model", str(directory), *arguments])
        assert "\n" not in str(error.value)

    def test_tasks_take_an_extra(self, directory, monkeypatch):
        for name in ("lm_eval", "lm_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, None)
        for name in ("harness", "tasks"):  # which another test may have imported
            monkeypatch.delitem(sys.modules, f"hymba_jax.evaluation.{name}", raising=False)
            monkeypatch.delattr(evaluation, name, raising=False)
        with pytest.raises(SystemExit, match=r'pip install "hymba_jax\[evaluate\]"'):
            cli.main(f"evaluate --model {directory} --tasks piqa".split())

    def test_nothing_to_score_is_an_error(self, directory, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
        with pytest.raises(SystemExit, match="no token to score"):
            cli.main(f"evaluate --model {directory} --data.path {tmp_path}".split())
