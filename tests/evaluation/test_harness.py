"""lm-evaluation-harness with local tasks, against values of the full forward pass in float64."""

import json
import os
import subprocess
import sys
from functools import partialmethod
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry.processes import addresses, ends, start
from inference.models import byte_tokenizer, make_model
from slow import slow_but

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: extra evaluate")

import yaml
from datasets import load_dataset
from lm_eval.tasks import TaskManager
from lm_eval.tasks.squad_completion.task import SQUADCompletion

from hymba_jax.checkpoint.save import save_model
from hymba_jax.errors import HymbaError
from hymba_jax.evaluation.answers import Answers
from hymba_jax.evaluation.control_marks import MARK
from hymba_jax.evaluation.harness import HarnessModel
from hymba_jax.evaluation.replicas import Replicas
from hymba_jax.evaluation.tasks import (
    GROUPS,
    Tasks,
    load_tasks,
    run_tasks,
    tables,
    write_results,
)
from hymba_jax.inference import LanguageModel
from hymba_jax.tokenizer import Tokenizer, chat_template

CONTEXT = 48
# Of a sum of up to 60 log-probabilities in nats, of logits in float32.
TOLERANCE = 1e-3
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def hymba():
    return make_model(layers="W")


def language_model(hymba, batch_size=3):
    base = byte_tokenizer()
    tokenizer = Tokenizer(base.model, base.bos, base.eos, TEMPLATE)
    return LanguageModel(hymba, tokenizer, batch_size=batch_size, context=CONTEXT)


@pytest.fixture(scope="module")
def model(hymba):
    return language_model(hymba)


@pytest.fixture(scope="module")
def log_softmax(hymba):
    """Of the logits after each token of a sequence, by the full forward pass, in float64."""
    forward = jax.jit(lambda tokens: hymba(tokens))

    def function(tokens):
        padded = np.zeros((1, 64), np.int32)  # causal: what is behind a token does not matter
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(jnp.asarray(padded)), np.float64)[0, : len(tokens)]
        shifted = logits - logits.max(1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    return function


@pytest.fixture(scope="module")
def likelihood(log_softmax):
    """The log-likelihood of a continuation's tokens, and whether it is greedy."""

    def function(context, continuation):
        tokens = [*context, *continuation][-(CONTEXT + 1) :]
        log_probs = log_softmax(tokens[:-1])[-len(continuation) :]
        total = log_probs[np.arange(len(continuation)), continuation].sum()
        return total, log_probs.argmax(1).tolist() == [*continuation]

    return function


@pytest.fixture(scope="module")
def greedy(log_softmax):
    """What greedy decoding samples after some tokens."""

    def function(tokens, count):
        sampled = []
        for _ in range(count):
            sampled.append(int(log_softmax([*tokens, *sampled])[-1].argmax()))
        return sampled

    return function


def ids(text):
    return byte_tokenizer().encode(text)


def begun(text):
    return [byte_tokenizer().bos_id, *ids(text)]


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


class TestLoglikelihood:
    PAIRS = (
        ("the old", " dog"),
        ("the old ", "dog"),  # the space goes to the continuation
        ("", "Grüße 世界"),
        ("a <s> in text", " </s>"),
        ("x" * 60, " long context"),  # truncated from the left
        ("the old", " dog"),
    )

    def expected(self, likelihood):
        pairs = [(c.rstrip(), c[len(c.rstrip()) :] + text) for c, text in self.PAIRS]
        return [likelihood(begun(context), ids(text)) for context, text in pairs]

    def test_it_equals_the_full_forward_pass(self, hymba, model, likelihood):
        """Whatever the order and the batch size."""
        alone = HarnessModel(language_model(hymba, batch_size=1))
        actual = HarnessModel(model).loglikelihood(requests(*self.PAIRS), disable_tqdm=True)
        reverse = alone.loglikelihood(requests(*self.PAIRS[::-1]), disable_tqdm=True)
        for result, other, expected in zip(
            actual, reverse[::-1], self.expected(likelihood), strict=True
        ):
            assert result[0] == pytest.approx(expected[0], abs=TOLERANCE)
            assert result[0] == pytest.approx(other[0], abs=TOLERANCE)
            assert result[1] == other[1] == expected[1]

    def test_the_order_of_requests_changes_no_bit(self, model):
        harness = [HarnessModel(model) for _ in range(2)]
        arguments = [(context, text) for context, text in self.PAIRS] + [("the bad", " dog")]
        first = harness[0].loglikelihood(requests(*arguments), disable_tqdm=True)
        reverse = harness[1].loglikelihood(requests(*arguments[::-1]), disable_tqdm=True)
        assert first == reverse[::-1]

    def test_a_context_of_white_space_without_bos(self, hymba, likelihood):
        """It goes to the continuation, and nothing is left before that but the prefix token."""
        tokenizer = Tokenizer(byte_tokenizer().model, None, "</s>")
        harness = HarnessModel(LanguageModel(hymba, tokenizer, context=CONTEXT))
        ((total, _),) = harness.loglikelihood(requests((" ", "yes")), disable_tqdm=True)
        expected = likelihood([tokenizer.eos_id], tokenizer.encode(" yes"))
        assert total == pytest.approx(expected[0], abs=TOLERANCE)

    def test_it_knows_what_greedy_decoding_gives(self, model, greedy):
        tokens = greedy(begun("the"), 4)
        pairs = [(None, begun("the"), tokens), (None, begun("the"), [*tokens[:3], tokens[3] ^ 1])]
        results = HarnessModel(model)._loglikelihood_tokens(pairs)
        assert [is_greedy for _, is_greedy in results] == [True, False]

    def test_a_continuation_longer_than_the_context_is_an_error(self, model):
        with pytest.raises(HymbaError, match="continuation of 49 tokens is longer"):
            HarnessModel(model).loglikelihood(requests(("a", "b" * 49)), disable_tqdm=True)

    def test_rolling_covers_every_token_once(self, model, likelihood):
        texts = ["short", "", "the old dog sat on the red mat " * 4]
        strings = [(text,) for text in texts]
        actual = HarnessModel(model).loglikelihood_rolling(requests(*strings), disable_tqdm=True)
        expected = []
        for text in texts:
            tokens, total, done = begun(text), 0.0, 1
            while done < len(tokens):
                stop = min(len(tokens), done + CONTEXT)  # windows that are predicted whole
                window = tokens[max(0, stop - CONTEXT - 1) : stop]
                total += likelihood(window[: -(stop - done)], window[-(stop - done) :])[0]
                done = stop
            expected.append(total)
        assert actual == pytest.approx(expected, abs=TOLERANCE)


class TestGeneration:
    def test_it_stops_before_a_stop_string_across_tokens(self, model, greedy):
        """Its characters are several tokens each, of this tokenizer."""
        text = byte_tokenizer().decode(greedy(begun("the red"), 30))
        stop = text[9:12]
        end = text.index(stop)
        task = {"until": [stop, "never"], "max_gen_toks": 30}
        (result,) = HarnessModel(model).generate_until(requests(("the red", task)))
        assert result == text[:end]

    def test_contexts_are_truncated_from_the_left(self, model, greedy):
        """To leave room for the new tokens; an empty one is the beginning-of-sequence token."""
        task = {"until": [], "max_gen_toks": 8}
        contexts = ["x" * 30 + "the old dog sat on the mat", "", "Grüße"]
        results = HarnessModel(model).generate_until(requests(*((c, task) for c in contexts)))
        for context, result in zip(contexts, results, strict=True):
            expected = greedy(begun(context)[-(CONTEXT - 8) :], 8)
            assert result == byte_tokenizer().decode(expected)

    def test_repeated_samples_differ_and_are_reproducible(self, hymba, model):
        task = {"until": ["\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
        arguments = requests(*[("the", task)] * 3, ("dog", task))
        results = HarnessModel(model).generate_until(arguments)
        assert len({*results[:3]}) == 3
        alone = HarnessModel(language_model(hymba, batch_size=1))
        assert alone.generate_until(arguments) == results

    def test_filters_have_no_effect_on_greedy_decoding(self, model):
        plain, filtered = HarnessModel(model).generate_until(
            requests(
                ("the", {"max_gen_toks": 6}),
                ("the", {"max_gen_toks": 6, "do_sample": False, "top_p": 0.9, "temperature": 0.7}),
            )
        )
        assert plain == filtered

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ({"max_gen_toks": 48}, "asks for 48 new tokens, the model's context is 48"),
            ({"num_beams": 4}, "generation with num_beams 4, which there is not"),
        ],
    )
    def test_what_cannot_be_done_is_an_error(self, model, task, message):
        with pytest.raises(HymbaError, match=message):
            HarnessModel(model).generate_until(requests(("a", task)))


class TestReplicas:
    def test_results_have_the_same_bits_on_several_devices(self, hymba, model):
        """Of three, where batches of three requests do not come out even."""
        words = ["the", "old", "dog", "sat", "on", "the", "red", "mat"]
        pairs = [(" ".join(words[:i]), f" {words[i]}") for i in range(len(words))] * 2
        tasks = [
            {"max_gen_toks": 6},
            {"max_gen_toks": 6, "do_sample": True, "temperature": 1.0},
        ]
        prompts = [(context, task) for context, _ in pairs for task in tasks]
        alone = HarnessModel(model)
        several = HarnessModel(model, replicas=Replicas(model, jax.devices()[:3]))
        for method, arguments in (("loglikelihood", pairs), ("generate_until", prompts)):
            expected = getattr(alone, method)(requests(*arguments), disable_tqdm=True)
            actual = getattr(several, method)(requests(*arguments), disable_tqdm=True)
            assert actual == expected
            assert len(set(map(str, actual))) > 4


class TestChat:
    MESSAGES = (
        {"role": "user", "content": "Is </s> a token?"},
        {"role": "assistant", "content": "No."},
    )

    def test_a_template_without_control_tokens(self, hymba, greedy):
        """No token is added before the conversation, and an answer ends where the next message
        begins, whatever a task's stop strings are."""
        template = (
            "{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
        )
        base = byte_tokenizer()
        tokenizer = Tokenizer(base.model, base.bos, base.eos, template)
        harness = HarnessModel(LanguageModel(hymba, tokenizer, context=CONTEXT))
        messages = [{"role": "user", "content": "Hi"}]
        text = harness.apply_chat_template(messages)
        assert harness.tok_encode(text) == ids("\nuser: Hi\nassistant: ")
        assert harness._answer_end == (("</s>", "\nuser:"), ())
        asked = []
        harness._generate = lambda missing, quiet: (
            asked.extend(config.stop for _, config in missing.values())
            or harness._answers.add(dict.fromkeys(missing, ""))
        )
        task = {"until": ["#"], "max_gen_toks": 8}
        harness.generate_until(requests((text, task), ("plain", task)))
        assert asked == [("#", "</s>", "\nuser:"), ("#",)]

    def test_the_tokens_are_those_of_the_template(self, model):
        harness = HarnessModel(model)
        text = harness.apply_chat_template([*self.MESSAGES])
        expected = chat_template.encode(model.tokenizer, self.MESSAGES, add_generation_prompt=True)
        assert harness.tok_encode(text) == expected
        assert text.replace(MARK, "") == chat_template.render_chat(
            model.tokenizer, self.MESSAGES, add_generation_prompt=True
        )
        assert expected.count(model.tokenizer.eos_id) == 2  # and not the user's

    def test_a_last_message_is_continued(self, model):
        text = HarnessModel(model).apply_chat_template(
            [*self.MESSAGES], add_generation_prompt=False
        )
        assert text.replace(MARK, "").endswith("assistant: No.")

    def test_records(self, model):
        harness = HarnessModel(model)
        assert harness.tokenizer_name == model.tokenizer.fingerprint
        assert harness.chat_template(True) == TEMPLATE
        assert harness.chat_template(False) is None


class TestModelArguments:
    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ("path=.,batch_size=8", {}, "batch_size has no effect there: give --batch_size"),
            ("path=.,color=red", {}, "no argument 'color', there are path, answers, adapter,"),
            ("path=.", {"batch_size": "auto"}, "batch_size is auto: give a number"),
            ("dtype=float32", {}, "name a model: path=DIRECTORY"),
        ],
    )
    def test_what_is_wrong_with_them(self, arguments, options, message):
        with pytest.raises(HymbaError, match=message):
            HarnessModel.create_from_arg_string(arguments, options)


class TestAnswers:
    def test_an_interrupted_evaluation_resumes(self, hymba, tmp_path, monkeypatch):
        """Killed in the third of four batches, in the middle of writing a line."""
        path, model = tmp_path / "answers.jsonl", language_model(hymba, batch_size=1)
        pairs = requests(("a", "b"), ("aa", "b"), ("aaa", "b"), ("aaaa", "b"))
        expected = HarnessModel(model).loglikelihood(pairs, disable_tqdm=True)
        computed = []
        score = model.engine.score

        def counted(sequences):
            if len(computed) == 2:
                raise KeyboardInterrupt
            computed.extend(sequences)
            return score(sequences)

        monkeypatch.setattr(model.engine, "score", counted)
        with pytest.raises(KeyboardInterrupt):
            HarnessModel(model, Answers(path, model)).loglikelihood(pairs, disable_tqdm=True)
        with path.open("a") as file:
            file.write('{"key": "half')
        computed.clear()
        resumed = HarnessModel(model, Answers(path, model))
        assert resumed.loglikelihood(pairs, disable_tqdm=True) == expected
        assert len(computed) == 2
        assert len(path.read_text().splitlines()) == 4

    def test_another_model_has_other_answers(self, hymba, model, tmp_path):
        other = language_model(make_model(layers="W", norm_eps=1e-5))
        small = LanguageModel(hymba, byte_tokenizer(), context=CONTEXT, kv_cache="int8")
        models = (model, other, LanguageModel(hymba, byte_tokenizer(), context=CONTEXT), small)
        keys = [Answers(tmp_path / "a", each).key("x") for each in models]
        assert len({*keys}) == len(keys)
        assert keys[0] == Answers(tmp_path / "b", model).key("x")

    def test_another_file_is_refused(self, tmp_path, model):
        path = tmp_path / "notes.jsonl"
        path.write_text('{"text": "hello"}\n')
        with pytest.raises(HymbaError, match=r"notes.jsonl, line 1: not an answer"):
            Answers(path, model)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
"""
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "completion": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


OWN_TASK = """
from lm_eval.api.task import ConfigurableTask

class Own(ConfigurableTask):
    def __init__(self):
        files = {{"test": "{data}"}}
        super().__init__(config={{
            "task": "own",
            "dataset_path": "json",
            "dataset_kwargs": {{"data_files": files}},
            "test_split": "test",
            "doc_to_text": "q",
            "doc_to_target": "a",
        }})

    def doc_to_text(self, doc):
        return doc["question"]
"""
PLACES = (("Ann", "Oslo"), ("Bo", "Rome"))


@pytest.fixture
def local_tasks(tmp_path, monkeypatch, greedy):
    """A choice, a text and a SQuAD-like completion of each of two documents."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    records = [
        {"question": question, "choices": ["dog", "mat", "cat and hat"], "answer": 1}
        for question in ("the old", "sat on the")
    ]
    first = byte_tokenizer().decode(greedy(begun("the old"), 8)).split("\n")[0]
    for record, completion in zip(records, (first, "something else"), strict=True):
        record["completion"] = completion
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "tasks").mkdir()
    for name, rest in TASKS.items():
        text = TASK.format(name=name, file=data) + rest
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    return records


@pytest.fixture
def only_ours(monkeypatch):
    """Without the harness' own tasks, thousands of files."""
    monkeypatch.setattr(Tasks, "__init__", partialmethod(Tasks.__init__, include_defaults=False))


class TestTasks:
    def test_local_tasks(self, model, local_tasks, likelihood, tmp_path):
        manager = TaskManager(include_path=tmp_path / "tasks", include_defaults=False)
        results = run_tasks(HarnessModel(model), [*TASKS], manager, num_fewshot=0)
        best = [
            max(r["choices"], key=lambda c: likelihood(begun(r["question"]), ids(f" {c}"))[0])
            for r in local_tasks
        ]
        accuracy = np.mean([each == "mat" for each in best])
        nats = sum(likelihood(begun(""), ids(r["question"]))[0] for r in local_tasks)
        size = sum(len(r["question"]) for r in local_tasks)
        metrics = results["results"]
        assert metrics["choice"]["acc,none"] == accuracy
        assert metrics["rolling"]["bits_per_byte,none"] == pytest.approx(-nats / np.log(2) / size)
        assert metrics["completion"]["exact_match,none"] == 0.5
        assert "exact_match" in tables(results)
        write_results(results, tmp_path / "out.json")
        assert json.loads((tmp_path / "out.json").read_text())["results"].keys() == TASKS.keys()

    def test_what_is_wrong_with_a_task(self, only_ours, local_tasks, tmp_path):
        """The harness has tracebacks for its data and template, and leaves out what is no YAML."""
        tasks, empty = tmp_path / "tasks", tmp_path / "empty.jsonl"
        empty.touch()
        text = TASK.format(name="empty", file=empty) + TASKS["rolling"]
        (tasks / "empty.yaml").write_text(text)
        text = TASK.format(name="field", file=tmp_path / "data.jsonl") + TASKS["completion"]
        (tasks / "field.yaml").write_text(text.replace("{{question}}", "{{problem}}"))
        for name, reason in (("empty", "no documents"), ("field", ".*'problem' is undefined")):
            with pytest.raises(HymbaError, match=rf"^tasks {name} cannot be loaded \(.*{reason}\)"):
                load_tasks([name], str(tasks))
        (tasks / "broken.yaml").write_text("task: broken\n  output_type: [")
        with pytest.raises(HymbaError, match=r"broken\.yaml: not a YAML file \(mapping values"):
            load_tasks(["broken"], str(tasks))

    @pytest.mark.parametrize(
        ("yaml", "names", "message"),
        [
            ("task: runs\nunsafe_code: true", ["runs"], "task runs runs the code that a model"),
            ("task: own\nclass: !function own.Own", ["own"], "task own takes no examples: leave"),
            (
                "group: both\ntask: [choice, rolling]",
                ["both", "choice"],
                "Duplicate task 'choice'.*: evaluate them one after another, with one file",
            ),
            ("task: lost\nclass: !function lost.Lost", ["lost"], ".*: install nowhere$"),
        ],
    )
    def test_tasks_that_cannot_be_run(self, only_ours, local_tasks, tmp_path, yaml, names, message):
        """Before a model is loaded; the harness has tracebacks, some after hours."""
        tasks = tmp_path / "tasks"
        if "unsafe" in yaml:
            yaml += TASK.format(name="runs", file=tmp_path / "data.jsonl") + TASKS["completion"]
            yaml = yaml.replace("task: runs", "", 1)
        (tasks / "more.yaml").write_text(yaml)
        (tasks / "lost.py").write_text("import nowhere")
        (tasks / "own.py").write_text(OWN_TASK.format(data=tmp_path / "data.jsonl"))
        with pytest.raises(HymbaError, match=message):
            load_tasks(names, str(tasks), num_fewshot=1)

    def test_patterns(self, only_ours, local_tasks, tmp_path):
        manager, names = load_tasks(["c*"], str(tmp_path / "tasks"))
        assert names == ["choice", "completion"]
        assert [*manager.load(names)["tasks"]] == names

    def test_a_group_with_examples_for_all_members_of_its_groups(
        self, only_ours, local_tasks, tmp_path
    ):
        """As hymba_base has MMLU: written as a task, all members would have one name."""
        tasks = tmp_path / "tasks"
        for name in ("choice", "completion"):
            with (tasks / f"{name}.yaml").open("a") as file:
                file.write("tag: tagged\n")
        (tasks / "inner.yaml").write_text("group: inner\ntask: [tagged]")
        (tasks / "outer.yaml").write_text("group: outer\ntask: [{group: inner, num_fewshot: 1}]")
        manager, names = load_tasks(["outer"], str(tasks))
        loaded = manager.load(names)["tasks"]
        assert [*loaded] == ["choice", "completion"]
        assert [task.config.num_fewshot for task in loaded.values()] == [1, 1]

    def test_squad_completion_has_an_example(self, only_ours, tmp_path, monkeypatch):
        """Another document with its answer before each."""
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        lines = [{"text": f" {name} lives in ", "value": f" {place} "} for name, place in PLACES]
        data = tmp_path / "validation.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        monkeypatch.setattr(
            SQUADCompletion,
            "download",
            lambda task, *_: setattr(
                task, "dataset", load_dataset("json", data_files={"validation": str(data)})
            ),
        )
        manager, names = load_tasks(["squad_completion_1shot"])
        (task,) = manager.load(names)["tasks"].values()
        task.set_fewshot_seed(seed=1234)
        assert task.config.num_fewshot == 1
        prompt = task.fewshot_context(lines[0], 1)
        assert prompt == "Bo lives in Rome\n\nAnn lives in"

    @pytest.mark.parametrize("batch_size", slow_but([1, 8], 1))
    def test_accuracies_do_not_depend_on_batch_size_and_devices(
        self, hymba, model, local_tasks, tmp_path, batch_size
    ):
        """Log-likelihoods do, by rounding, which decides nothing unless two are as close."""
        manager = TaskManager(include_path=tmp_path / "tasks", include_defaults=False)
        expected = run_tasks(HarnessModel(model), [*TASKS], manager)["results"]
        other = language_model(hymba, batch_size)
        replicas = Replicas(other, jax.devices()[:2])
        harness = HarnessModel(other, replicas=replicas)
        actual = run_tasks(harness, [*reversed(TASKS)], manager)["results"]
        for task, metric in (("choice", "acc,none"), ("completion", "exact_match,none")):
            assert actual[task][metric] == expected[task][metric]
        bits = [each["rolling"]["bits_per_byte,none"] for each in (expected, actual)]
        assert bits[0] == pytest.approx(bits[1], rel=1e-5)

    @pytest.mark.slow
    def test_two_processes_have_the_results_of_one(self, hymba, local_tasks, tmp_path):
        """Of two devices each; the first one writes, and answers are known to both."""
        save_model(tmp_path / "model", hymba, byte_tokenizer())
        output, answers = tmp_path / "out.json", tmp_path / "answers.jsonl"
        command = ["hymba_jax", "evaluate", "--model", str(tmp_path / "model"), "--batch-size", "1"]
        command += ["--context", str(CONTEXT), "--include-path", str(tmp_path / "tasks")]
        command += ["--tasks", ",".join(TASKS), "--output", str(output)]
        results, texts = [], []
        for processes in (1, 2):
            where = addresses(processes) if processes > 1 else [([], {})]
            where = [([*options, "--answers", str(answers)], env) for options, env in where]
            started = [
                start([*command, *options], 2, tmp_path / "cache", env, program="-m")
                for options, env in where
            ]
            ended = ends(started)
            assert [each.status for each in ended] == [0] * processes, ended
            assert all("exact_match" not in each.stdout for each in ended[1:])
            results.append(json.loads(output.read_text())["results"])
            texts.append(sorted(answers.read_text().splitlines()))
            answers.unlink()
        assert texts[0] == texts[1]
        assert results[0] == results[1]

    @pytest.mark.slow
    def test_the_papers_tasks_exist(self):
        manager = TaskManager(include_path=GROUPS)
        names = [path.stem for path in GROUPS.glob("hymba_*.yaml")]
        assert len(names) == 5
        for name in names:
            listed = yaml.safe_load((GROUPS / f"{name}.yaml").read_text())
            assert listed["group"] == name
            for task in listed["task"]:
                assert (task if isinstance(task, str) else task["group"]) in manager.all_tasks

    @pytest.mark.slow
    def test_both_commands(self, hymba, local_tasks, tmp_path):
        """Ours and the harness' own, with the answers of ours; each in a process."""
        save_model(tmp_path / "model", hymba, byte_tokenizer())
        tasks, answers = ["--tasks", "choice,completion"], tmp_path / "answers.jsonl"
        ours = ["-m", "hymba_jax", "evaluate", "--model", "model", "--answers", "answers.jsonl"]
        ours += ["--context", str(CONTEXT), "--include-path", "tasks", "--output", "out.json"]
        theirs = ["-m", "hymba_jax.evaluation.harness", "run", "--model", "hymba_jax"]
        theirs += ["--model_args", f"path=model,context={CONTEXT},answers=answers.jsonl"]
        theirs += ["--include_path", "tasks", "--output_path", "theirs"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        for command in (ours, theirs):
            subprocess.run(
                [sys.executable, *command, *tasks], cwd=tmp_path, env=environment, check=True
            )
            assert len(answers.read_text().splitlines()) == 8  # six choices, two completions
        (file,) = (tmp_path / "theirs").rglob("results*.json")
        results = [
            json.loads(each.read_text())["results"] for each in (tmp_path / "out.json", file)
        ]
        assert results[0]["choice"]["acc,none"] == results[1]["choice"]["acc,none"]
        assert results[0]["completion"]["exact_match,none"] == 0.5
