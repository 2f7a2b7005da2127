"""A training run, from top to bottom."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import jax
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
from hymba_jax.checkpoint.staged_checkpoints import open_checkpoints
from hymba_jax.checkpoint.train_state import TrainState, abstract_train_state, init_state
from hymba_jax.config import HymbaConfig
from hymba_jax.config.field_types import leaves
from hymba_jax.config.run import RunConfig
from hymba_jax.config.training import TrainingConfig
from hymba_jax.data import Batch, Data, Tokenizer, prepare, train_iterator
from hymba_jax.data.batch import abstract_batch
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.files import replace_text, resolve_location
from hymba_jax.hf_files import keep_hf_files
from hymba_jax.model.flops import training_flops
from hymba_jax.model.sharding import describe_sharding
from hymba_jax.parallel.mesh import batch_sharding, global_batch, make_mesh, process_rows
from hymba_jax.parallel.processes import is_main_process
from hymba_jax.training.capacity import check_memory
from hymba_jax.training.loss import make_loss_fn, next_token_loss
from hymba_jax.training.mfu import Workload, peak_flops
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.profile import FOLDER as PROFILE
from hymba_jax.training.profile import Tracer
from hymba_jax.training.recorder import Recorder
from hymba_jax.training.sample import SAMPLE_FILE, Generate, check_sample, sample
from hymba_jax.training.step import Metrics, check_batch, compile_train_step, make_train_step
from hymba_jax.training.uploaded_metrics import open_metrics
from hymba_jax.training.validation import Validate, make_validate


def train(config: RunConfig, generate: Generate) -> None:
    """Trains a model, or resumes the run in the run directory; writes a sample at the end.

    Args:
      generate: the sample, from the trained model.

    Raises:
      HymbaError: the config is invalid for this run, the output cannot be written, or training
        diverged.
    """
    check_output(config.output, config.init_from)
    check_processes(dict(leaves(config, "")), config.output)
    mesh = make_mesh(parallel=config.parallel)
    check_batch(config.training.micro_batch_size, mesh)
    # A lost process aborts the others, which then cannot restore the terminal.
    display = Display(plain=jax.process_count() > 1, quiet=not is_main_process())
    lock = (
        locked(resolve_location(config.output), display.say) if is_main_process() else nullcontext()
    )
    with display, lock, jax.set_mesh(mesh):
        _train(config, generate, mesh, display)


def _train(config: RunConfig, generate: Generate, mesh: Mesh, display: Display) -> None:
    previous, initial = _find_start(config)
    data = _read_data(config, previous, initial, display)
    before = previous.model if previous else initial.config if initial else None
    config = _with_vocabulary(config, before, data.tokenizer, display)
    training, length = config.training, config.data.sequence_length
    optimizer = make_optimizer(training)
    abstract = abstract_train_state(config.model, config.compute, optimizer, mesh)
    check_memory(abstract, mesh)
    _announce(config, abstract.num_params, data, mesh, display)

    display.begin("compiling")
    loss_fn = make_loss_fn(next_token_loss, abstract.graph)
    train_step = compile_train_step(
        make_train_step(loss_fn, optimizer, micro_batch_size=training.micro_batch_size),
        abstract.state,
        abstract_batch(
            training.batch_size,
            length,
            batch_sharding(mesh),
            segment_ids=config.data.packing == "documents",
        ),
    )
    rows = process_rows(mesh, training.batch_size)
    examples = data.train_rows(config.data)
    batches = train_iterator(examples, training.batch_size, config.seed, rows)
    limit = training.validation_batches * training.batch_size
    validate = make_validate(loss_fn, data, mesh, length, training.micro_batch_size, limit)
    if initial is not None:
        display.say(initial.describe(config.model))
        state = initial.load_state(config.model, config.compute, optimizer, abstract, mesh)
    elif previous is None:
        state = init_state(config.model, config.compute, optimizer, abstract, config.seed)

    def loop_state(step: int) -> LoopState:
        return LoopState(step, batches.get_state(), data.train_digest, data.validation_digest)

    # All checks are done: from here on the run directory is written.
    with open_checkpoints(config.output, training.keep_checkpoints) as checkpoints:
        start = 0
        if previous is not None:
            state, saved = checkpoints.restore(abstract.state)
            _check_same_run(saved, data, training.steps, config.output)
            batches.set_state(saved.batches)
            start = saved.step
            complete = f"complete at step {start}: raise training.steps to continue"
            resuming = f"resuming after step {start}"
            display.say(complete if start == training.steps else resuming)
        _write_directory(config, data.tokenizer, is_new=previous is None)
        output = resolve_location(config.output) if is_main_process() else None
        trace = output / PROFILE if output and config.profile else None
        with open_metrics(output, start) as writer, Tracer(trace, start) as tracer:
            if writer.removed:
                display.say(writer.removed)
            flops = training_flops(config.model, length)
            workload = _workload(training.batch_size, length, flops, mesh)
            epoch = len(examples) / training.batch_size
            recorder = Recorder(training, workload, epoch, start, writer, display)
            placed = map(partial(global_batch, mesh=mesh, batch_size=training.batch_size), batches)
            state = _run_steps(
                state,
                range(start + 1, training.steps + 1),
                training,
                train_step=train_step,
                batches=placed,
                validate=validate,
                checkpoints=checkpoints,
                loop_state=loop_state,
                recorder=recorder,
                tracer=tracer,
                display=display,
            )

    if training.sample_tokens:
        display.begin("writing a sample")
        text = sample(generate, abstract.graph, state.params, data.tokenizer, mesh)
        if text is not None:
            replace_text(resolve_location(config.output) / SAMPLE_FILE, text)
            display.say(text)
    display.say(f"done: {config.output}")


def _run_steps(
    state: TrainState,
    steps: range,
    training: TrainingConfig,
    *,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    validate: Validate,
    checkpoints: Checkpoints,
    loop_state: Callable[[int], LoopState],
    recorder: Recorder,
    tracer: Tracer,
    display: Display,
) -> TrainState:
    """The state after these steps, with validation and checkpoints on schedule and after the
    last."""
    for step in steps:
        with recorder.waiting_for("input"):
            batch = next(batches)
        recorder.collect()
        with tracer.step(step):
            state, metrics = train_step(state, batch)
        recorder.submit(step, metrics)
        checkpoints.check()
        last = step == training.steps
        if last or step % training.validate_every == 0:
            if last:
                display.begin("validating on all held-out text")
            with recorder.paused():
                validation = validate(state.params, last)
            recorder.flush(validation)
        if last or step % training.checkpoint_every == 0:
            # A diverged run stops here, before it is saved. The line of metrics ends here, too, so
            # that a run that resumes from this checkpoint starts a new one.
            recorder.flush(log=True)
            with recorder.waiting_for("checkpoint"):
                checkpoints.save(state, loop_state(step))
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
    config: RunConfig, previous: RunConfig | None, initial: InitialModel | None, display: Display
) -> Data:
    """The corpus, by the tokenizer that the run has already or, for a new one, the config's."""
    tokenizer = None
    if previous is not None:
        tokenizer = Tokenizer.load(config.output)
    elif initial is not None and (tokenizer := initial.tokenizer_for(config.data)) is not None:
        display.say(
            f"keeping the tokenizer of {initial.directory}: {config.data.tokenizer} "
            "would train another one with different ids"
        )
    display.begin("reading and tokenizing")
    data = prepare(
        config.data,
        tokenizer,
        lambda done, total: display.update(f"tokenizing, {done / total:.0%}"),
        config.output,
    )
    if initial is not None:
        initial.check_tokenizer(data.tokenizer, config.data.tokenizer)
    check_data(data)
    return data


def _with_vocabulary(
    config: RunConfig, before: HymbaConfig | None, tokenizer: Tokenizer, display: Display
) -> RunConfig:
    """The run with its vocab_size resolved: that of the source model, or of the tokenizer.

    Raises:
      HymbaError: the model does not fit the tokenizer, or has too few positions for the sample.
    """
    embeddings = before.num_embeddings if before else tokenizer.vocab_size
    model, training = config.model.with_vocabulary(embeddings), config.training
    tokenizer.check_fits(model, config.data.tokenizer)
    check_sample(training.sample_prompt, training.sample_tokens, tokenizer, model.max_positions)
    if tokenizer.vocab_size < model.num_embeddings:
        display.say(
            f"{model.num_embeddings - tokenizer.vocab_size:,} of {model.num_embeddings:,} rows of "
            f"the embedding are padding: the tokenizer has {tokenizer.vocab_size:,} tokens"
        )
    return dataclasses.replace(config, model=model)


def _announce(config: RunConfig, num_params: int, data: Data, mesh: Mesh, display: Display) -> None:
    """Says what is trained, on what."""
    devices, length = jax.devices(), config.data.sequence_length
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    display.say(
        f"{config.output}: {num_params:,} parameters in {config.model.num_layers} layers, "
        f"{len(devices)} x {devices[0].device_kind}{processes}; {config.training.steps:,} steps of "
        f"{config.training.batch_size * length:,} tokens, {data.train.num_tokens:,} tokens of text"
    )
    for note in data.notes:
        display.say(note)
    if mesh.size > 1:
        display.say(describe_sharding(config.model, mesh, length))


def _check_same_run(saved: LoopState, data: Data, steps: int, output: str) -> None:
    """Raises HymbaError if a checkpoint is of other data, or of a later step than the last."""
    for side, digest, now in (
        ("training", saved.train_digest, data.train_digest),
        ("validation", saved.validation_digest, data.validation_digest),
    ):
        if digest != now:
            raise HymbaError(
                f"{output}: was trained on other {side} data than data.path holds now: restore "
                "that data, or choose another output"
            )
    if saved.step > steps:
        raise HymbaError(
            f"{output}: is at step {saved.step}, training.steps is {steps}: set more steps, or "
            "choose another output"
        )


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
