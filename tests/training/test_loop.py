"""The loop around the step: real data, files and checkpoints, and arithmetic for a model."""

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from entry.command import write_config
from flax import nnx
from inference.models import byte_tokenizer, make_model
from slow import slow_but

from hymba_jax.checkpoint import run_directory
from hymba_jax.checkpoint.checkpoints import resolve_step
from hymba_jax.checkpoint.save import save_model
from hymba_jax.config.data import DataConfig, SourceConfig, WeightedSourceConfig
from hymba_jax.config.distill import DistillConfig
from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import StageConfig, StageSourceConfig
from hymba_jax.config.tracking import TrackingConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data import IGNORED_TARGET
from hymba_jax.errors import HymbaError
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.run_files import checkpoint_steps
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.training import loop, stage_program
from hymba_jax.training.extension import describe_changes
from hymba_jax.training.interrupts import Interrupts
from hymba_jax.training.loss import Average
from hymba_jax.training.sample import check_sample


def is_counter(leaf):
    """Of steps, in the state of an optimizer."""
    return leaf.ndim == 0 and leaf.dtype == jnp.int32


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch):
    """In place of the model: losses that depend on the batch alone, as integers."""

    def compile_train_step(*_):
        def step(state, batch, *_teacher):
            loss = Average(jnp.float32(batch.inputs.sum()), jnp.int32(batch.inputs.size))
            state = jax.tree.map(lambda leaf: leaf + 1 if is_counter(leaf) else leaf, state)
            return state, {"loss": loss, "grad_norm": Average(2 * loss.mean, 1)}

        return step

    def make_loss_fn(*_):
        def loss_fn(_, batch, *_teacher):
            counts = batch.targets != IGNORED_TARGET
            return {"loss": Average(jnp.where(counts, batch.targets, 0).sum(), counts.sum())}

        return loss_fn

    def init_state(_config, _compute, _optimizer, abstract, _seed):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract.state)

    monkeypatch.setattr(stage_program, "compile_train_step", compile_train_step)
    monkeypatch.setattr(stage_program, "make_loss_fn", make_loss_fn)
    monkeypatch.setattr(loop, "init_state", init_state)
    monkeypatch.setattr(loop, "make_mesh", lambda **_: make_mesh(jax.devices()[:1]))


@pytest.fixture
def config(tmp_path):
    """Of 4 steps of 8 sequences, in a directory inside the corpus."""
    config = RunConfig.from_toml(
        write_config(tmp_path, tmp_path / "corpus" / "runs" / "mine"), RunConfig()
    )
    return changed(config, sample_tokens=0)


def changed(config, **training):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def train(config, output=None, interrupts=None, evaluations=()):
    """The lines of metrics of a run, without its times."""
    if output is not None:
        config = dataclasses.replace(config, output=str(output))

    def generate(model, _):
        return f"text of {model.config.vocab_size} tokens"

    loop.train(config, generate, interrupts=interrupts, evaluations=evaluations)
    with open(f"{config.output}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def test_validation_does_not_depend_on_batch_size_or_gradient_accumulation(config, tmp_path):
    """One of 8 sequences after step 3, and one of the whole text after step 4."""
    lines = [
        train(changed(config, **batches), tmp_path / str(number))
        for number, batches in enumerate(
            ({}, {"gradient_accumulation_steps": 4}, {"batch_size": 3})
        )
    ]
    assert lines[1] == lines[0]
    sampled, last = ([each[step]["validation_loss"] for each in lines] for step in (2, 3))
    assert sampled[0] == sampled[2] != last[0] == last[2]


def test_a_resumed_run_has_the_lines_of_one_that_never_stopped(config, tmp_path, capsys):
    """Though it stopped between two lines."""
    config = changed(config, steps=12, log_every=5, validate_every=100, checkpoint_every=3)
    config = changed(config, keep_checkpoints=4)
    expected = train(config, tmp_path / "elsewhere")
    assert [line["step"] for line in expected] == [5, 10, 12]
    assert [line["tokens_seen"] for line in expected[:2]] == [5 * 8 * 24, 10 * 8 * 24]
    assert train(config) == expected
    for step in (9, 10, 12):  # 10 is before the decay
        shutil.rmtree(f"{config.output}/checkpoints/{step}")
    with open(f"{config.output}/metrics.jsonl", "a") as file:
        file.write("[]\n")
    capsys.readouterr()
    assert train(config) == expected
    said = capsys.readouterr().out
    assert "resuming after step 6" in said
    assert "moved lines to metrics.removed.jsonl: 2 after step 5, 1 damaged" in said


class InterruptedAt(Interrupts):
    """Of a run that gets a signal before it polls for the n-th time."""

    def __init__(self, n):
        super().__init__()
        self._left = n

    def poll(self):
        self._left -= 1
        if not self._left:
            self.receive(signal.SIGTERM)
        return super().poll()


def test_a_run_that_is_interrupted_has_the_lines_of_one_that_was_not(config, tmp_path):
    """Validations that were due, and the lines of metrics that wait for them, come after all."""
    config = changed(config, steps=5, log_every=2, validate_every=3, validation_sequences=16)
    config = changed(config, checkpoint_every=100)
    expected = train(config, tmp_path / "elsewhere")
    assert [line["step"] for line in expected] == [2, 3, 4, 5]
    # In a validation's second batch, in its first, after a step, and before the last validation.
    for n, step, logged in ((6, 3, 2), (2, 3, 2), (4, 4, 4), (2, 5, 4)):
        interrupts = InterruptedAt(n)
        lines = train(config, interrupts=interrupts)
        assert interrupts.agreed == signal.SIGTERM
        assert checkpoint_steps(config.output)[-1] == step
        assert lines == [line for line in expected if line["step"] <= logged]
    assert train(config) == expected
    assert train(config) == expected  # nothing is left to do
    assert not Path(config.output, "metrics.removed.jsonl").exists()
    best = resolve_step(config.output, "best")
    assert best == resolve_step(tmp_path / "elsewhere", "best") == 3


def test_a_validation_that_is_the_best_so_far_saves_a_checkpoint(config, monkeypatch):
    config = changed(config, steps=8, validate_every=2, checkpoint_every=5, keep_checkpoints=1)
    config = changed(config, schedule="constant")
    losses = iter([5, 3, 4, 3.5])
    monkeypatch.setattr(loop, "comparable_loss", lambda _: next(losses))
    train(config)
    assert checkpoint_steps(config.output) == [4, 8]
    losses = iter([4, 2, 3])
    train(changed(config, steps=13))
    assert checkpoint_steps(config.output) == [12, 13]
    losses = iter([1])
    train(changed(config, steps=14, keep_best=False))
    assert checkpoint_steps(config.output) == [14]


@pytest.mark.parametrize("other", [{"sequence_length": 48}, {"validate_on": ("corpus",)}])
def test_validations_of_stages_on_other_text_are_not_compared(config, monkeypatch, other):
    """Of three stages with two validations each, of which the last validates on other text."""
    losses = iter([6, 5, 3, 4, 9, 8])
    monkeypatch.setattr(loop, "comparable_loss", lambda _: next(losses))
    config = changed(config, steps=TrainingConfig.steps, validate_every=2, checkpoint_every=100)
    config = changed(config, schedule="constant")
    stage = StageConfig(steps=4)
    last = dataclasses.replace(stage, **other)
    config = dataclasses.replace(config, stages={"one": stage, "two": stage})
    train(config)
    assert resolve_step(config.output, "best") == 6
    train(dataclasses.replace(config, stages={**config.stages, "three": last}))
    assert resolve_step(config.output, "best") == 12


def test_the_last_validation_is_compared_with_the_others_on_their_text(config):
    config = changed(config, steps=2, validate_every=1)
    first, last = train(config)
    assert last["validation_loss"] != first["validation_loss"]  # of more text
    assert last["validation_sample_loss"] == first["validation_loss"]


@dataclasses.dataclass(frozen=True)
class Needle:
    """An evaluation that says which step it is after and what model it is of."""

    name: str = "needle"
    every: int = 2

    def run(self, params, graph, step):
        model = nnx.merge(graph, params)
        return {"step": step, "vocab_size": model.config.vocab_size}


def test_evaluations_run_on_their_schedule_and_none_is_skipped(config, tmp_path):
    config = changed(config, steps=7, log_every=100, validate_every=6, checkpoint_every=100)
    needles = [Needle(), Needle("rare", every=5)]
    expected = train(config, tmp_path / "elsewhere", evaluations=needles)
    evaluated = [
        *((2, ["needle"]), (4, ["needle"]), (5, ["rare"])),
        *((6, ["needle", "validation"]), (7, ["needle", "rare", "validation"])),
    ]
    assert evaluated == [
        (
            line["step"],
            [name for name in ("needle", "rare") if line.get(f"{name}/step") == line["step"]]
            + ["validation"] * ("validation_loss" in line),
        )
        for line in expected
    ]
    assert expected[0]["needle/vocab_size"] == 259
    # Before the evaluation after step 2, and, resumed there, before the one after step 4.
    for n, step in ((3 + 1, 2), (1 + 1 + 2 + 1, 4)):
        interrupts = InterruptedAt(n)
        lines = train(config, interrupts=interrupts, evaluations=needles)
        assert checkpoint_steps(config.output)[-1] == step
        assert lines == [line for line in expected if line["step"] < step]
    assert train(config, evaluations=needles) == expected


@pytest.mark.parametrize("needles", [[Needle("a/b")], [Needle(), Needle()], [Needle(every=0)]])
def test_evaluations_that_cannot_be_told_apart_or_never_run_are_refused(config, needles):
    with pytest.raises(HymbaError, match=r"evaluation .*: (choose another name|every is 0)"):
        train(config, evaluations=needles)


def test_fewer_steps_than_were_done_are_refused(config):
    train(config)
    before = (Path(config.output) / "config.toml").read_text()
    with pytest.raises(HymbaError, match=r"is finished, at step 4, training\.steps is 3: set mo"):
        train(changed(config, steps=3))
    assert (Path(config.output) / "config.toml").read_text() == before


def test_other_data_is_refused(config, tmp_path, capsys):
    """Where the tokens are not those of the run: changed text alone is not read again."""
    train(config)
    tokens = Path(config.output) / "tokens"
    page = tmp_path / "corpus" / "page3.txt"
    text = page.read_text()
    page.write_text(text[::-1])
    train(config)
    assert "data.path: the run has the tokens, no text is tokenized" in capsys.readouterr().out
    shutil.rmtree(tokens)
    with pytest.raises(HymbaError, match="the training source corpus has other tokens than"):
        train(config)
    page.write_text(text)
    train(config)


def test_tokens_that_another_process_does_not_see_are_one_line(config, monkeypatch):
    monkeypatch.setattr(loop, "is_main_process", lambda: False)
    monkeypatch.setattr(run_directory, "_VISIBILITY_TIMEOUT", 0)
    message = "process 0 does not see what process 0 wrote there: choose an output on a file system"
    with pytest.raises(HymbaError, match=f"^{config.output}: {message} that all share"):
        train(config)


def test_a_tracker_gets_every_line_of_metrics(config, monkeypatch):
    class Tracker:
        start = write = close = lambda self, *given: calls.append(given)

    calls = []
    monkeypatch.setattr(loop, "make_trackers", lambda _: {"fake": Tracker()})
    train(config)
    run, *written, closed = calls
    assert run[0].config["training"]["steps"] == 4
    assert [(step, "loss" in metrics) for step, metrics in written] == [
        (step, True) for step in range(1, 5)
    ]
    assert closed == ()


REFUSED = {
    "it has 259 tokens, model.vocab_size is 100": lambda config: dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=100)
    ),
    "nowhere: no such file": lambda config: dataclasses.replace(
        config, data=dataclasses.replace(config.data, path="nowhere")
    ),
    "tensorboard: tensorboardX is not installed": lambda config: dataclasses.replace(
        config, tracking=TrackingConfig(tensorboard=True)
    ),
    "nothing: no model found": lambda config: dataclasses.replace(config, init_from="nothing"),
    "sample_tokens make 104 tokens": lambda config: changed(config, sample_tokens=100),
    "untaught: no model found": lambda config: dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, objective="distill"),
        distill=DistillConfig(teacher="untaught"),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refused_run_leaves_no_directory(config, tmp_path, monkeypatch, message):
    monkeypatch.setattr("hymba_jax.training.trackers.find_spec", lambda _: None)
    with pytest.raises(HymbaError, match=message):
        train(REFUSED[message](config), tmp_path / "runs" / "refused")
    assert not (tmp_path / "runs").exists()


def test_a_run_from_scratch_keeps_old_metrics(config):
    """As after a run that stopped before its first checkpoint."""
    before = train(config)
    path = Path(config.output)
    old = (path / "metrics.jsonl").read_text()
    shutil.rmtree(path / "checkpoints")
    assert train(config) == before
    assert (path / "metrics.removed.jsonl").read_text() == old


def test_the_sample_is_what_the_model_generates(config, capsys):
    """Printed as it is, whatever names of emoji or of styles it has."""

    def generate(model, _):
        return f"[bold]s[:x:{model.config.vocab_size}]"

    loop.train(changed(config, sample_tokens=8), generate)
    assert (Path(config.output) / "sample.txt").read_text() == "[bold]s[:x:259]"
    assert "[bold]s[:x:259]\n" in capsys.readouterr().out


def staged(config, *stages):
    """The config with stages, of which each is a name, steps and other fields."""
    base = changed(config, steps=TrainingConfig().steps)
    stages = {name: StageConfig(steps=steps, **fields) for name, steps, fields in stages}
    return dataclasses.replace(base, stages=stages)


def without_validation(line):
    return {name: value for name, value in line.items() if not name.startswith("validation")}


STABLE = ("stable", 4, {"schedule": "constant"})
DECAY = ("decay", 4, {"schedule": "linear", "batch_size": 4, "warmup_steps": 0})
LONGER = ("longer", 3, {"sequence_length": 48, "max_positions": 96, "batch_size": 4})


def test_stages_are_one_run(config, tmp_path):
    """With the data, shapes and rates of each, in lines that never mix two of them."""
    config = changed(config, log_every=3, checkpoint_every=100, keep_checkpoints=1)
    config = changed(config, keep_best=False)
    lines = train(staged(config, STABLE, DECAY, LONGER))
    found = [(line["step"], line["stage"], line["tokens_seen"]) for line in lines]
    per_step = {"stable": 8 * 24, "decay": 4 * 24, "longer": 4 * 48}
    assert found == [
        (3, "stable", 3 * per_step["stable"]),
        (4, "stable", 4 * per_step["stable"]),
        (6, "decay", 4 * per_step["stable"] + 2 * per_step["decay"]),
        (8, "decay", 4 * per_step["stable"] + 4 * per_step["decay"]),
        (9, "longer", found[3][2] + per_step["longer"]),
        (11, "longer", found[3][2] + 3 * per_step["longer"]),
    ]
    # Sequences of 24 tokens, through two stages, then of 48.
    epochs = [line["epoch"] / line["tokens_seen"] for line in lines]
    assert epochs == pytest.approx([epochs[0]] * 6, rel=0.05)  # what makes no whole sequence
    validated = [line["step"] for line in lines if "validation_loss" in line]
    assert validated == [3, 4, 6, 8, 9, 11]
    whole = [line["step"] for line in lines if "validation_sample_loss" in line]
    assert whole == [4, 8, 11]
    # The last, and those before the decays of the second stage and the third.
    assert checkpoint_steps(config.output) == [4, 10, 11]


def test_stages_with_the_same_shapes_share_their_programs(config, monkeypatch):
    compiled = []
    compile_eval_step = stage_program.compile_eval_step

    def counted(loss_fn, params, batch):
        compiled.append(batch.inputs.shape)
        return compile_eval_step(loss_fn, params, batch)

    monkeypatch.setattr(stage_program, "compile_eval_step", counted)
    same = ("same", 4, {"schedule": "linear"})
    train(staged(config, STABLE, same, LONGER))
    assert compiled == [(8, 24), (4, 48)]


# After the last step of a stage, and between two of the last stage.
@pytest.mark.parametrize("steps", slow_but([[4, 9], [2, 5, 8, 11]], [4, 9]))
def test_a_run_resumes_in_any_stage(config, tmp_path, steps):
    config = changed(config, log_every=2, validate_every=3, checkpoint_every=1)
    config = staged(changed(config, keep_checkpoints=20), STABLE, DECAY, LONGER)
    expected = train(config, tmp_path / "elsewhere")
    assert train(config) == expected
    for kept in steps:
        for step in checkpoint_steps(config.output):
            if step > kept:
                shutil.rmtree(f"{config.output}/checkpoints/{step}")
        assert train(config) == expected


def test_a_run_is_extended(config, tmp_path, capsys):
    """By a longer last stage, and by another one: those of a run that had them from the start."""
    expected = train(staged(config, STABLE, DECAY, LONGER), tmp_path / "elsewhere")
    train(staged(config, ("stable", 3, {"schedule": "constant"})))
    train(staged(config, STABLE))
    train(staged(config, STABLE, DECAY))
    capsys.readouterr()
    lines = train(staged(config, STABLE, DECAY, LONGER))
    assert "stages added: longer" in capsys.readouterr().out
    # Where a run ended, all of the validation documents were read.
    assert [without_validation(line) for line in lines] == [*map(without_validation, expected)]
    longer = (*DECAY[:1], 6, DECAY[2])
    with pytest.raises(HymbaError, match=r"stages\.decay: training\.steps was 4, is 6"):
        train(staged(config, STABLE, longer, LONGER))


def test_a_stage_that_is_complete_needs_no_teacher(config, tmp_path):
    teacher = tmp_path / "teacher"
    save_model(teacher, make_model(layers="L"), byte_tokenizer())

    def taught(*later):
        run = staged(config, ("taught", 2, {}), *later)
        first = dataclasses.replace(run.stages["taught"], objective="distill")
        return dataclasses.replace(
            run, distill=DistillConfig(teacher=str(teacher)), stages={**run.stages, "taught": first}
        )

    train(taught(STABLE))
    shutil.rmtree(teacher)
    lines = train(taught(STABLE, DECAY))
    assert lines[-1]["step"] == 10
    with pytest.raises(HymbaError, match=f"{teacher}: no model found"):
        train(taught(), tmp_path / "other")


def test_an_empty_sample_prompt_needs_a_token_to_begin_with():
    model = byte_tokenizer().model
    check_sample("", 4, Tokenizer(model, "<s>", "</s>"), max_positions=8)
    without = Tokenizer(model, None, "</s>")
    check_sample("", 0, without, max_positions=8)
    with pytest.raises(HymbaError, match="sample_prompt is empty, and the tokenizer has no token"):
        check_sample("", 4, without, max_positions=8)


def test_a_stage_validates_on_sources_of_its_own(config, tmp_path):
    """With the losses of a run that validates on all."""
    for name in ("pages", "other"):
        (tmp_path / f"{name}.txt").write_text(f"a corpus of {name}, of one document " * 40)
    held_out = {name: SourceConfig(str(tmp_path / f"{name}.txt")) for name in ("pages", "other")}
    data = dataclasses.replace(config.data, validation=held_out)
    config = changed(dataclasses.replace(config, data=data), validate_every=2)
    stages = [(name, 4, {"validate_on": on}) for name, on in (("both", None), ("one", ("other",)))]
    every = train(staged(config, *((name, steps, {}) for name, steps, _ in stages)))
    lines = train(staged(config, *stages), tmp_path / "chosen")
    for line, expected in zip(lines, every, strict=True):
        if line["step"] <= 4:
            assert line == expected
        elif "validation_loss" in expected:
            assert line["validation_loss"] == expected["validation_loss/other"]
            assert not [name for name in line if name.startswith("validation_loss/")]
    with pytest.raises(HymbaError, match=r"stages\.both: training\.validate_on was \(\), is \('p"):
        train(
            staged(config, ("both", 5, {"validate_on": ("pages",)}), *stages[1:]),
            tmp_path / "chosen",
        )


def test_a_stage_on_a_new_source_is_added(config, tmp_path, capsys):
    """What a run trains on that had source and stage from the start, with its own tokens."""
    other = tmp_path / "other.txt"
    other.write_text("another corpus, of one document " * 40)

    def staged_on(stages, **paths):
        sources = {name: WeightedSourceConfig(str(path)) for name, path in paths.items()}
        data = dataclasses.replace(config.data, path="", sources=sources)
        return staged(dataclasses.replace(config, data=data), *stages)

    def on(source):
        return {"sources": {source: StageSourceConfig()}}

    pages = config.data.path
    stages = [("stable", 4, STABLE[2] | on("pages")), ("more", 3, on("other"))]
    both = staged_on(stages, pages=pages, other=other)
    expected = train(both, tmp_path / "elsewhere")
    train(staged_on([STABLE], pages=pages))
    with pytest.raises(HymbaError, match=r"stable has begun without the new source other"):
        train(staged_on([STABLE], pages=pages, other=other))
    capsys.readouterr()
    lines = train(both)
    said = capsys.readouterr().out
    assert "data.sources.pages: the run has the tokens, no text is tokenized" in said
    assert "other sources than before: the best checkpoint is that of later steps" in said
    assert [without_validation(line) for line in lines] == [*map(without_validation, expected)]
    with pytest.raises(HymbaError, match=r"the share of other was 1\.0, and has gone"):
        train(staged_on([STABLE, ("more", 3, {})], pages=pages))


def test_a_new_source_that_a_stage_would_read_from_now_on_is_refused(config, tmp_path):
    """Until it has no weight of its own, as the message says."""
    other = tmp_path / "other.txt"
    other.write_text("another corpus, of one document " * 40)
    pages = {"pages": WeightedSourceConfig(config.data.path)}

    def on(sources, *stages):
        data = dataclasses.replace(config.data, path="", sources=sources)
        return staged(dataclasses.replace(config, data=data), *stages)

    train(on(pages, STABLE))
    stages = STABLE, ("more", 3, {"sources": {"other": StageSourceConfig()}})
    problem = (
        "stage stable has begun without the new source other, and reads it now, as it names no "
        r"sources: set data\.sources\.other\.weight to 0, and stages\.NAME\.sources\.other\.weight "
    )
    with pytest.raises(HymbaError, match=problem):
        train(on(pages | {"other": WeightedSourceConfig(str(other))}, *stages))
    lines = train(on(pages | {"other": WeightedSourceConfig(str(other), weight=0.0)}, *stages))
    assert lines[-1]["sequences/pages"] == 4 * 8
    assert lines[-1]["sequences/other"] == 3 * 8


def test_changed_updates_are_reported_if_there_are_any(config, capsys):
    train(changed(config, steps=4))
    other = changed(config, weight_decay=0.2, clip_norm=2.0)
    saved = Path(config.output, "config.toml").read_text()
    capsys.readouterr()
    train(other)
    said = capsys.readouterr().out
    assert "complete at step 4" in said
    assert "weight_decay" not in said
    assert Path(config.output, "config.toml").read_text() == saved
    train(changed(other, steps=5))
    said = capsys.readouterr().out
    assert "training.weight_decay is 0.2 from step 5 on, it was 0.1\n" in said
    assert "training.clip_norm is 2.0 from step 5 on, it was 1.0\n" in said
    assert "weight_decay = 0.2" in Path(config.output, "config.toml").read_text()


def test_a_run_on_packed_documents_says_how_much_is_padding(config, capsys):
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, packing="documents")))
    said = capsys.readouterr().out
    assert re.search(
        r"corpus: packed as documents, \d+\.\d% of its rows of 24 positions is padding\n", said
    )


def test_a_run_on_generated_tasks_resumes_exactly(config, tmp_path, capsys):
    """Through stages, the second of which has longer rows of them."""
    data = DataConfig(
        tokenizer="bytes",
        sequence_length=24,
        packing="documents",
        validation_packing="documents",
        sources={
            "few": WeightedSourceConfig("mqar:2:8"),
            "more": WeightedSourceConfig("mqar:4:24"),
        },
        validation={"few": SourceConfig("mqar:2:8"), "more": SourceConfig("mqar:4:24")},
    )
    config = dataclasses.replace(config, data=data)
    longer = ("longer", 4, {"sequence_length": 48})
    config = staged(changed(config, validate_every=3), STABLE, longer)
    expected = train(config, tmp_path / "elsewhere")
    said = capsys.readouterr().out
    assert "8 steps, 2,304 tokens\n" in said
    assert "data.sources.more: is generated: 1,048,576 sequences\n" in said
    assert "data.validation.few: is generated: 512 sequences\n" in said
    assert "few: packed as documents, 0.0% of its rows of 48 positions is padding\n" in said
    assert "validation_loss/few" in expected[-1]
    assert not any("bits_per_byte" in name for line in expected for name in line)
    assert [expected[-1][f"sequences/{name}"] for name in data.sources] == [32, 32]
    train(config)
    for step in checkpoint_steps(config.output)[1:]:
        shutil.rmtree(f"{config.output}/checkpoints/{step}")
    assert train(config) == expected

    other = {"more": WeightedSourceConfig("mqar:3:24")}
    data = dataclasses.replace(data, sources={**data.sources, **other})
    with pytest.raises(HymbaError, match="the training source more has other tokens than those"):
        train(dataclasses.replace(config, data=data))


def test_a_decay_that_is_lengthened_says_what_it_does(config, capsys):
    decay = {"schedule": "linear", "warmup_steps": 0, "learning_rate": 0.4}
    decay["min_learning_rate"] = 0.0
    stable = {"schedule": "constant", "learning_rate": 0.4}
    train(staged(config, ("stable", 3, stable), ("decay", 4, decay)))
    assert checkpoint_steps(config.output)[0] == 3
    capsys.readouterr()
    train(staged(config, ("stable", 3, stable), ("decay", 8, decay)))
    said = capsys.readouterr().out
    assert "stage decay has 8 steps, where it had 4" in said
    assert "decays since step 3: at step 7 the learning rate was 0, from there on" in said
    assert "longer schedule has, 0.2;" in said
    assert "remove the checkpoints after checkpoints/3" in said


def test_changed_rates_of_later_steps_and_stages_are_said():
    """Of stages that are not done, and whether or not the next step's rate is another."""

    def config(decay, *later, **options):
        stages = {
            "stable": StageConfig(steps=10, schedule="constant"),
            "decay": StageConfig(steps=10, schedule="wsd", **decay),
            **{name: StageConfig(steps=10, **settings) for name, settings in later},
        }
        return RunConfig(stages=stages, training=TrainingConfig(warmup_steps=0, **options))

    before = config({}, ("longer", {"learning_rate": 0.001}), ("last", {}))
    after = config({"decay_steps": 5}, ("longer", {"learning_rate": 0.002}), weight_decay=0.2)
    assert [*describe_changes(before, before, 12)] == []
    assert [*describe_changes(before, after, 12)] == [
        "stage decay: decay_steps is 5, it was None",
        "stage longer: learning_rate is 0.002, it was 0.001",
        "stages removed: last",
        "training.weight_decay is 0.2 from step 13 on, it was 0.1",
    ]
    assert [*describe_changes(dataclasses.replace(before, stages={}), after, 2)] == [
        "stage stable has 10 steps, where it had 1,000",
        "stage stable: schedule is 'constant', it was 'wsd'",
        "stages added: decay, longer",
        "training.weight_decay is 0.2 from step 3 on, it was 0.1",
    ]


CHANGED = {
    "stages.stable: training.batch_size was 8, is": [("stable", 4, {"batch_size": 4}), DECAY],
    "stages.other: name was 'stable', is 'other'": [("other", 4, {}), DECAY],
    "stages.stable: training.steps was 4, is 5": [("stable", 5, {}), DECAY],
    "stages.stable: training.learning_rate was .*, is 0.2": [
        ("stable", 4, {"schedule": "constant", "learning_rate": 0.2}),
        DECAY,
    ],
    "stages.decay has gone": [STABLE],
    r"is at step 6, stages\.decay\.steps is 1": [STABLE, (*DECAY[:1], 1, DECAY[2])],
}


def test_what_is_done_cannot_change(config):
    config = changed(config, checkpoint_every=1, keep_checkpoints=9)
    train(staged(config, STABLE, DECAY))
    for step in (7, 8):
        shutil.rmtree(f"{config.output}/checkpoints/{step}")
    for problem, stages in CHANGED.items():
        with pytest.raises(HymbaError, match=problem):
            train(staged(config, *stages))
        assert checkpoint_steps(config.output)[-1] == 6
