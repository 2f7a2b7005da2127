"""`hymba batch`: a file of requests, answered as by a server."""

import json
import signal
from dataclasses import replace

import pytest
from serving.served import model

from hymba_jax.errors import HymbaError
from hymba_jax.file_lock import locked
from hymba_jax.inference.fingerprint import model_fingerprint
from hymba_jax.inference.loading import ModelChoice
from hymba_jax.serving import batch
from hymba_jax.serving.batch import BatchConfig

CHAT = {"messages": [{"role": "user", "content": "h"}], "temperature": 0, "max_tokens": 5}


def line(custom_id, url="/v1/completions", **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m"} | body}


LINES = [
    *(line(f"t{n}", prompt="ab", max_tokens=n, temperature=0) for n in range(1, 15)),
    line("chat", "/v1/chat/completions", **CHAT),
    line("é", prompt="a", n=0),
    line("big", prompt="a" * 99),
]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(ModelChoice, "load", lambda self, **options: model())
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    names = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out.jsonl")}
    return BatchConfig(ModelChoice("runs/m"), **names, slots=4, prefix_cache=0)


def read(path):
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    return {answer["custom_id"]: answer for answer in answers}


def test_every_request_is_answered_once(config, tmp_path, capsys, monkeypatch):
    """Also if the command was killed, in the middle of a line: what is answered stays as it is."""
    monkeypatch.setattr(batch, "LOG_EVERY", 0.0)
    kept = {"custom_id": "t3", "response": "kept", "error": None}
    partial = tmp_path / "out.jsonl.partial"
    batch.check_same(tmp_path / "out.jsonl.model", config, model_fingerprint(model()), LINES, set())
    partial.write_text(json.dumps(kept) + '\n{"custom_id": "t4", "resp')
    batch.main(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    answers = read(tmp_path / "out.jsonl")
    assert sorted(answers) == sorted(each["custom_id"] for each in LINES)
    assert answers.pop("t3") == kept
    (whole,) = model().generate("ab", max_new_tokens=14)
    for n in {*range(1, 15)} - {3}:
        response = answers[f"t{n}"]["response"]
        assert response["status_code"] == 200
        assert response["body"]["choices"][0]["text"] == whole.text[:n]
        assert response["request_id"] == response["body"]["id"]
    prompt = model().encode_chat(CHAT["messages"])
    (wanted,) = model().generate([prompt], max_new_tokens=5)
    (choice,) = answers["chat"]["response"]["body"]["choices"]
    assert choice["message"]["content"] == wanted.text
    for refused in ("é", "big"):
        assert answers[refused]["response"]["status_code"] == 400
        assert answers[refused]["error"]["type"] == "invalid_request_error"
    notes = capsys.readouterr().err
    assert f"resumes with {len(LINES) - 1} of {len(LINES)} requests" in notes
    assert f"{len(LINES) - 1} of {len(LINES) - 1} requests are answered" in notes
    assert f"{len(LINES)} answers, 2 of them errors, such as: " in notes


def test_ctrl_c(config, tmp_path, capsys, monkeypatch):
    """The same command resumes, and that is said."""
    answer = batch._answer

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return answer(*args)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    monkeypatch.setattr(batch, "_answer", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            batch.main(config)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(batch, "_answer", answer)
    assert "stopped by Ctrl-C: the same command resumes with what" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    batch.main(config)
    assert "out.jsonl.partial: resumes with " in capsys.readouterr().err
    assert len(read(tmp_path / "out.jsonl")) == len(LINES)


def test_slots_are_checked_before_the_model_is_loaded(config):
    with pytest.raises(HymbaError, match="slots is 3, not a power of two"):
        replace(config, slots=3)


def test_a_complete_output_is_left_alone(config, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("answers")
    with pytest.raises(HymbaError, match=r"out.jsonl: exists already: name another output, or "):
        batch.main(config)
    assert output.read_text() == "answers"


def test_an_output_of_errors_is_an_error(config, tmp_path):
    with pytest.raises(HymbaError, match=rf"all {len(LINES)} answers are errors, such as: .*'m'"):
        batch.main(replace(config, name="another"))
    assert len(read(tmp_path / "out.jsonl")) == len(LINES)


def test_answers_of_two_models_are_not_mixed(config, tmp_path):
    """Nor of one model in two ways, nor of two requests; without an answer, either may begin."""
    record, partial = (tmp_path / f"out.jsonl.{end}" for end in ("model", "partial"))

    def begun_with(requests=LINES, name="", slots=4, scale=1.0, **changes):
        choice = replace(config.choice, **changes)
        begun = replace(config, choice=choice, name=name, slots=slots)
        batch.check_same(record, begun, model_fingerprint(model(scale)), requests, set())

    begun_with(model="runs/other")
    partial.write_text('{"custom_id": "t3", "response": "kept", "error": null}\n')
    with pytest.raises(HymbaError, match=r"out.jsonl.partial: begun with model .*other, not .*m: "):
        batch.main(config)
    begun_with(weights="int8", context=64)
    with pytest.raises(HymbaError, match="weights int8, not float, context 64, not None: give"):
        batch.main(config)
    begun_with(name="n")
    with pytest.raises(HymbaError, match="begun with name n, not m"):
        batch.main(config)
    begun_with(slots=8)
    with pytest.raises(HymbaError, match="begun with slots 8, not 4"):
        batch.main(config)
    begun_with(scale=2.0)
    with pytest.raises(HymbaError, match=r"begun with another model than .*m holds now: restore"):
        batch.main(config)
    begun_with([{**LINES[2], "body": {}}])
    with pytest.raises(HymbaError, match="the request 't3', which it answers, is gone or another"):
        batch.main(config)
    record.write_text("weights")
    with pytest.raises(HymbaError, match=r"out.jsonl.model: broken JSON"):
        batch.main(config)
    record.unlink()
    with pytest.raises(HymbaError, match=r"out.jsonl.model, which says whose answers it "):
        batch.main(config)
    partial.write_text("")
    batch.main(config)
    assert len(read(tmp_path / "out.jsonl")) == len(LINES)


def test_a_model_that_cannot_be_loaded_leaves_no_file(config, tmp_path, monkeypatch):
    def load(choice, **options):
        raise HymbaError("no model found")

    monkeypatch.setattr(ModelChoice, "load", load)
    with pytest.raises(HymbaError, match="no model found"):
        batch.main(config)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("text", ['{"a": 1}\n', "[]\n", "1\n", "a sentence\nand a half"])
def test_what_is_beside_the_output_is_left_alone(config, tmp_path, text):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(text)
    with pytest.raises(HymbaError, match=r"out.jsonl.partial, line 1: not an answer of `hymba ba"):
        batch.main(config)
    assert partial.read_text() == text


def test_one_process_at_a_time_answers_to_a_file(config, tmp_path):
    other = "`hymba batch` of the same output"
    with (
        locked(tmp_path / "out.jsonl.lock", other, print),
        pytest.raises(HymbaError, match=f"a {other} is writing there"),
    ):
        batch.main(config)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_requests_are_not_replaced_by_their_answers(config):
    with pytest.raises(HymbaError, match=r"in.jsonl: is the input, name another file"):
        batch.main(replace(config, output=config.input))
    assert len(batch.read_requests(config.input)) == len(LINES)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "there are no requests in it"),
        (["{"], "line 1: broken JSON"),
        ([LINES[0], {}], 'line 2: not an object with a "custom_id"'),
        ([LINES[0], LINES[0]], "line 2: another line has the custom_id 't1'"),
        ([line("a", "/v1/models")], '"url" none of /v1/completions, /v1/chat/completions'),
        ([line("a", stream=True)], 'no "body", or one with "stream"'),
    ],
)
def test_what_is_refused(config, tmp_path, lines, message):
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(HymbaError) as error:
        batch.main(config)
    assert message in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()
