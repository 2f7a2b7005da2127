"""A training run, from top to bottom."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from hymba_jax.checkpoint.checkpoints import Checkpoints, LoopState
from hymba_jax.checkpoint.init_from import InitialModel, read_initial_model
from hymba_jax.checkpoint.run_directory import (
    check_data,
    check_output,
    check_processes,
    check_resumes,
    check_written,
    read_run,
    write_run_directory,
)
from hymba_jax.checkpoint.run_lock import locked
from hymba_jax.checkpoint.train_state import (
    AbstractTrainState,
    TrainState,
    abstract_train_state,
    init_state,
)
from hymba_jax.config import HymbaConfig
from hymba_jax.config.field_types import leaves
from hymba_jax.config.run import RunConfig
from hymba_jax.data import (
    Batch,
    Data,
    Tokenizer,
    open_data,
    tokenize_sources,
    train_iterator,
)
from hymba_jax.data.batch import abstract_batch
from hymba_jax.data.examples import Examples
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.files import replace_text
from hymba_jax.hf_files import keep_hf_files
from hymba_jax.model.flops import training_flops
from hymba_jax.model.sharding import describe_sharding
from hymba_jax.parallel.mesh import batch_sharding, global_batch, make_mesh, process_rows
from hymba_jax.parallel.processes import is_main_process, wait_for_all
from hymba_jax.training.capacity import check_memory
from hymba_jax.training.evaluation import Evaluation, Evaluations, check_evaluations
from hymba_jax.training.interrupts import Interrupts
from hymba_jax.training.loss import Objective, make_loss_fn, next_token_loss
from hymba_jax.training.metrics import MetricsWriter, last_step
from hymba_jax.training.mfu import Workload, peak_flops
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.profile import FOLDER as PROFILE
from hymba_jax.training.profile import Tracer
from hymba_jax.training.recorder import Recorder, RecorderState
from hymba_jax.training.run_start import record_start
from hymba_jax.training.sample import SAMPLE_FILE, Generate, check_sample, sample
from hymba_jax.training.step import Metrics, check_batch, compile_train_step, run_step
from hymba_jax.training.trackers import check_trackers, make_trackers
from hymba_jax.training.validation import comparable_loss, compile_eval_step, make_validate


def train(
    config: RunConfig,
    generate: Generate,
    objective: Objective = next_token_loss,
    interrupts: Interrupts | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> None:
    """Trains a model, or resumes the run in the run directory; writes a sample at the end.

    Args:
      generate: the sample, from the trained model.
      objective: what training minimizes and validation reports.
      interrupts: signals for which the run saves a checkpoint and returns early.
      evaluations: run on their schedules, beside validation.

    Raises:
      HymbaError: the config is invalid for this run, the output cannot be written, or training
        diverged.
    """
    check_output(config.output, config.init_from)
    check_evaluations(evaluations)
    if is_main_process():
        check_trackers(config.tracking)
    check_processes(dict(leaves(config, "")), config.output)
    mesh = make_mesh(parallel=config.parallel)
    check_batch(config.training.micro_batch_size, mesh)
    # A lost process aborts the others, which then cannot restore the terminal.
    display = Display(plain=jax.process_count() > 1, quiet=not is_main_process())
    lock = locked(Path(config.output), display.say) if is_main_process() else nullcontext()
    with display, lock, jax.set_mesh(mesh):
        _train(config, generate, objective, interrupts or Interrupts(), evaluations, mesh, display)


def _train(
    config: RunConfig,
    generate: Generate,
    objective: Objective,
    interrupts: Interrupts,
    evaluations: Sequence[Evaluation],
    mesh: Mesh,
    display: Display,
) -> None:
    previous, initial = _find_start(config)
    source = previous.model if previous else initial.config if initial else None
    training, length = config.training, config.data.sequence_length
    optimizer = make_optimizer(training)

    def plan(tokenizer: Tokenizer) -> tuple[HymbaConfig, AbstractTrainState]:
        """The model for this tokenizer and its state, which fits the devices."""
        model = _fit_model(config, source, tokenizer)
        abstract = abstract_train_state(model, config.compute, optimizer, mesh)
        check_memory(abstract, mesh)
        return model, abstract

    data = _read_data(config, previous is not None, initial, plan, display)
    model, abstract = plan(data.tokenizer)
    config = dataclasses.replace(config, model=model)
    _announce(config, abstract.num_params, data, mesh, display)

    display.begin("compiling")
    loss_fn = make_loss_fn(objective, abstract.graph)
    step, batch = run_step(config, loss_fn, optimizer, mesh)
    train_step = compile_train_step(step, abstract.state, batch)
    eval_step = compile_eval_step(
        loss_fn,
        abstract.state.params,
        abstract_batch(
            training.micro_batch_size,
            length,
            batch_sharding(mesh),
            segment_ids=config.data.validation_packing == "documents",
        ),
    )
    limit = training.validation_batches * training.batch_size
    validate = make_validate(
        eval_step, data.validation, mesh, training.micro_batch_size, limit, interrupts.poll
    )

    rows = process_rows(mesh, training.batch_size)
    batches = train_iterator(data.train, training.batch_size, rows)
    global_batches = map(partial(global_batch, mesh=mesh, batch_size=training.batch_size), batches)

    state, saved = None, None
    if previous is None:
        state = _init_state(config, initial, optimizer, abstract, mesh, display)
    # All checks are done: from here on the run directory is written.
    with Checkpoints(
        config.output, training.keep_checkpoints, keep_best=training.keep_best
    ) as checkpoints:
        if state is None:
            state, saved = checkpoints.restore(abstract.state, display.say)
            _check_same_run(saved, data, training.steps, config.output)
            batches.set_state(saved.batches)
            display.say(_resuming(saved, training.steps))
        _write_directory(config, data.tokenizer, is_new=previous is None)
        output = Path(config.output) if is_main_process() else None
        trace = output / PROFILE if output and config.profile else None
        start = saved.step if saved else 0
        recorded = RecorderState(**(saved.recorder or {})) if saved else RecorderState()
        run = None
        if output:
            before = last_step(output)
            run = record_start(config, recorded.logged, before, is_resumed=previous is not None)
        with (
            MetricsWriter(run, display.say, make_trackers(config.tracking)) as writer,
            Tracer(trace, start) as tracer,
        ):
            recorder = Recorder(
                training.steps,
                training.log_every,
                _workload(training.batch_size, length, training_flops(model, length), mesh),
                lambda step: data.train.progress(step * training.batch_size),
                partial(_name_examples, data.train, training.batch_size),
                writer,
                display,
                recorded,
            )

            def save(state: TrainState, step: int, validation_due: bool) -> None:
                recorded = recorder.state()
                loop = LoopState(
                    step,
                    batches.get_state(),
                    dict(data.digests),
                    recorded.skipped,
                    validation_due,
                    dataclasses.asdict(recorded),
                )
                with recorder.waiting_for("checkpoint"):
                    checkpoints.save(state, loop)

            with interrupts.deferred():
                state = _run_steps(
                    state,
                    start,
                    training.steps,
                    validation_due=saved is not None and saved.validation_due,
                    save_every=training.checkpoint_every,
                    train_step=train_step,
                    batches=global_batches,
                    evaluations=Evaluations(
                        validate,
                        training.validate_every,
                        evaluations,
                        abstract.graph,
                        training.steps,
                        interrupts.poll,
                    ),
                    save=save,
                    checkpoints=checkpoints,
                    interrupts=interrupts,
                    recorder=recorder,
                    tracer=tracer,
                    display=display,
                )
    if interrupts.agreed:
        return
    if training.sample_tokens:
        display.begin("writing a sample")
        text = sample(generate, abstract.graph, state.params, data.tokenizer, mesh)
        if output and text is not None:
            replace_text(output / SAMPLE_FILE, text)
            display.say(text)
    display.say(f"done: {config.output}")


def _run_steps(
    state: TrainState,
    start: int,
    steps: int,
    *,
    validation_due: bool,
    save_every: int,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    evaluations: Evaluations,
    save: Callable[[TrainState, int, bool], None],
    checkpoints: Checkpoints,
    interrupts: Interrupts,
    recorder: Recorder,
    tracer: Tracer,
    display: Display,
) -> TrainState:
    """The state after the last step, or after the one at which the run was asked to stop.

    Evaluates and saves on schedule and after the last step.

    Args:
      start: steps done already.
      validation_due: whether the evaluations after them are not.
    """
    for step in range(start, steps + 1):
        is_last = step == steps
        if step > start:
            with recorder.waiting_for("input"):
                batch = next(batches)
            recorder.collect()
            with tracer.step(step):
                state, metrics = train_step(state, batch)
            recorder.submit(step, metrics)
            checkpoints.check()
            validation_due = evaluations.are_due(step)
        stops, improves = interrupts.poll(), False
        if validation_due and not stops:
            if is_last:
                display.begin("validating on all held-out text")
            with recorder.paused():
                evaluated = evaluations.run(state.params, step)
            if evaluated is not None:
                recorder.flush(evaluated)
                improves = checkpoints.improves(step, comparable_loss(evaluated))
            validation_due = stops = evaluated is None
        if step > start and (stops or is_last or improves or step % save_every == 0):
            if not validation_due:  # whose line of metrics waits for it
                recorder.flush()
            save(state, step, validation_due)  # not a run that diverged: its metrics are read
        if stops:
            break
    checkpoints.wait()
    return state


def _find_start(config: RunConfig) -> tuple[RunConfig | None, InitialModel | None]:
    """The run that this one resumes, or the model that it starts from, if there is either."""
    previous = read_run(config.output)
    if previous is not None:
        check_resumes(previous, config)
        return previous, None
    if not config.init_from:
        return None, None
    initial = read_initial_model(config.init_from)
    initial.check_model(config.model)
    return None, initial


def _read_data(
    run: RunConfig,
    is_resumed: bool,
    initial: InitialModel | None,
    check: Callable[[Tokenizer], object],
    display: Display,
) -> Data:
    """The data, by the tokenizer that the run has already or, for a new one, the config's.

    Args:
      check: raises HymbaError if the run cannot use a tokenizer, before anything is written.
    """
    config, output, tokenizer = run.data, run.output, None
    if is_resumed:
        tokenizer = Tokenizer.load(output)
    elif initial is not None and (tokenizer := initial.tokenizer_for(config)) is not None:
        display.say(
            f"keeping the tokenizer of {initial.directory}: {config.tokenizer} "
            "would train another one with different ids"
        )
    if is_main_process():
        tokenize_sources(config, tokenizer, output, check, display, is_resumed=is_resumed)
    wait_for_all("tokens")
    data = open_data(config, tokenizer, output, run.seed)
    if initial is not None:
        initial.check_tokenizer(data.tokenizer, config.tokenizer)
    check_data(data)
    return data


def _fit_model(config: RunConfig, source: HymbaConfig | None, tokenizer: Tokenizer) -> HymbaConfig:
    """The model with its vocab_size resolved: that of the source model, or of the tokenizer.

    Raises:
      HymbaError: the model does not fit the tokenizer, or has too few positions for the sample.
    """
    embeddings = source.num_embeddings if source else tokenizer.vocab_size
    model, training = config.model.with_vocabulary(embeddings), config.training
    tokenizer.check_fits(model, config.data.tokenizer)
    check_sample(training.sample_prompt, training.sample_tokens, tokenizer, model.max_positions)
    return model


def _init_state(
    config: RunConfig,
    initial: InitialModel | None,
    optimizer: optax.GradientTransformation,
    abstract: AbstractTrainState,
    mesh: Mesh,
    display: Display,
) -> TrainState:
    """The state before the first step: of the initial model if there is one, else random."""
    if initial is None:
        return init_state(config.model, config.compute, optimizer, abstract, config.seed)
    display.say(initial.describe(config.model))
    return initial.load_state(config.model, config.compute, optimizer, abstract, mesh)


def _announce(config: RunConfig, num_params: int, data: Data, mesh: Mesh, display: Display) -> None:
    """Says what is trained, on what."""
    devices, length = jax.devices(), config.data.sequence_length
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    display.say(
        f"{config.output}: {num_params:,} parameters in {config.model.num_layers} layers, "
        f"{len(devices)} x {devices[0].device_kind}{processes}; {config.training.steps:,} steps of "
        f"{config.training.batch_size * length:,} tokens, {data.num_tokens:,} tokens of text"
    )
    tokens, rows = data.tokenizer.vocab_size, config.model.num_embeddings
    if tokens < rows:
        display.say(
            f"{rows - tokens:,} of {rows:,} rows of the embedding are padding: the tokenizer has "
            f"{tokens:,} tokens"
        )
    for note in data.notes:
        display.say(note)
    if mesh.size > 1:
        display.say(describe_sharding(config.model, mesh, length))


def _check_same_run(saved: LoopState, data: Data, steps: int, output: str) -> None:
    """Raises HymbaError if a checkpoint is of other data, or of a later step than the last."""
    for source, digest in saved.digests.items():
        if data.digests.get(source) != digest:
            raise HymbaError(
                f"{output}: the {source} has other tokens than those the run was trained on: "
                "restore them, or choose another output"
            )
    if saved.step > steps:
        raise HymbaError(
            f"{output}: is at step {saved.step}, training.steps is {steps}: set more steps, or "
            "choose another output"
        )


def _resuming(saved: LoopState, steps: int) -> str:
    """What a run does that resumes, in words."""
    if saved.step == steps and not saved.validation_due:
        return f"complete at step {steps}: raise training.steps to continue"
    return f"resuming after step {saved.step}"


def _name_examples(examples: Examples, batch_size: int, step: int) -> str:
    """The data of a step, in words."""
    return examples.describe((step - 1) * batch_size, step * batch_size)


def _write_directory(config: RunConfig, tokenizer: Tokenizer, *, is_new: bool) -> None:
    """Makes the run directory, by the first process for all."""
    if is_main_process():
        write_run_directory(config, tokenizer)
        if is_new:
            keep_hf_files(config.init_from, config.output)
    check_written(config.output)


def _workload(rows: int, length: int, flops: float, mesh: Mesh) -> Workload:
    """The workload of a step of so many sequences, each of which needs so many FLOPs."""
    return Workload(
        tokens=rows * length,
        flops=rows * flops,
        devices=mesh.size,
        peak_flops=peak_flops([device.device_kind for device in mesh.devices.flat]),
    )
