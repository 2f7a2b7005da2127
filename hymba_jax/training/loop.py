"""A training run, from top to bottom."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext

import jax
import optax
from jax.sharding import Mesh

from hymba_jax.checkpoint.checkpoints import Checkpoints, LoopState, trained_on
from hymba_jax.checkpoint.run_directory import (
    check_data,
    check_output,
    check_processes,
    check_resumes,
    check_visible,
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
from hymba_jax.checkpoint.uploaded_checkpoints import open_checkpoints
from hymba_jax.config import HymbaConfig
from hymba_jax.config.field_types import leaves
from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import Stage
from hymba_jax.convert.init_from import InitialModel, read_initial_model
from hymba_jax.data import (
    Data,
    open_data,
    source_formats,
    text_manifests,
    tokenize_sources,
    with_local_tokens,
)
from hymba_jax.data.examples import Examples
from hymba_jax.display import Display
from hymba_jax.errors import HymbaError
from hymba_jax.files import replace_text, resolve_location
from hymba_jax.hf_files import keep_hf_files
from hymba_jax.model.abstract import abstract_model
from hymba_jax.model.sharding import describe_sharding
from hymba_jax.model.trainable import describe_trainable, trainable_of
from hymba_jax.parallel.mesh import make_mesh
from hymba_jax.parallel.processes import is_main_process, wait_for_all
from hymba_jax.run_files import checkpoint_steps
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.training.capacity import check_memory
from hymba_jax.training.distillation import Teacher, check_teacher, read_teacher
from hymba_jax.training.evaluation import Evaluation, check_evaluations
from hymba_jax.training.extension import describe_changes
from hymba_jax.training.interrupts import Interrupts
from hymba_jax.training.loss import Objective
from hymba_jax.training.metrics import MetricsWriter, last_step
from hymba_jax.training.objectives import check_formats, check_objective, objective_of
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.profile import FOLDER as PROFILE
from hymba_jax.training.profile import Tracer
from hymba_jax.training.recorder import Recorder, RecorderState
from hymba_jax.training.run_start import record_start
from hymba_jax.training.sample import SAMPLE_FILE, Generate, check_sample, sample
from hymba_jax.training.schedule import run_schedule
from hymba_jax.training.stage_program import TEACHER, CompiledSteps, StageProgram, compile_stage
from hymba_jax.training.step import check_batch
from hymba_jax.training.trackers import check_trackers, make_trackers
from hymba_jax.training.uploaded_records import Records, open_records
from hymba_jax.training.validation import comparable_loss


def train(
    config: RunConfig,
    generate: Generate,
    objective: Objective | None = None,
    interrupts: Interrupts | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> None:
    """Trains a model, or resumes the run in the run directory; writes a sample at the end.

    Args:
      generate: the sample, from the trained model.
      objective: what training minimizes and validation reports, in place of the config's.
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
    for stage in config.resolved_stages:
        check_batch(stage.run.training, mesh)
    # A lost process aborts the others, which then cannot restore the terminal.
    display = Display(plain=jax.process_count() > 1, quiet=not is_main_process())
    lock = (
        locked(resolve_location(config.output), display.say) if is_main_process() else nullcontext()
    )
    with display, lock, jax.set_mesh(mesh):
        _train(config, generate, objective, interrupts or Interrupts(), evaluations, mesh, display)


def _train(
    config: RunConfig,
    generate: Generate,
    objective: Objective | None,
    interrupts: Interrupts,
    evaluations: Sequence[Evaluation],
    mesh: Mesh,
    display: Display,
) -> None:
    previous, initial = _find_start(config)
    source = previous.model if previous else initial.config if initial else None
    done = checkpoint_steps(config.output)[-1] if previous else 0

    def plan(tokenizer: Tokenizer) -> tuple[RunConfig, AbstractTrainState]:
        """The run with the model for this tokenizer, and its state.

        It fits the devices, and so do the teachers of the stages that are left.
        """
        run = dataclasses.replace(config, model=_fit_model(config, source, tokenizer))
        trainable = trainable_of(run)
        abstract = abstract_train_state(run.model, run.compute, _optimizer(run), mesh, trainable)
        check_memory(abstract, mesh)
        for stage in run.resolved_stages:
            if stage.stop > done:
                _read_teacher(stage, tokenizer, abstract, mesh)
        return run, abstract

    data = _read_data(config, previous is not None, initial, plan, display)
    config, abstract = plan(data.tokenizer)
    optimizer, stages = _optimizer(config), config.resolved_stages
    for stage in stages:
        check_objective(stage, data)
    examples = _examples(stages, data, config.seed)
    notes = [*data.notes, *_describe_rows(stages, examples, data)]
    _announce(config, abstract, data, notes, mesh, display)

    compiled_steps: dict[Hashable, CompiledSteps] = {}

    def compiled(stage: Stage) -> StageProgram:
        """What the steps of a stage need."""
        display.begin(f"compiling {stage.label}")
        return compile_stage(
            stage,
            examples[stage.name],
            data,
            _read_teacher(stage, data.tokenizer, abstract, mesh),
            objective or objective_of(stage.run),
            optimizer,
            abstract,
            evaluations,
            mesh,
            interrupts,
            compiled_steps,
        )

    ready: list[StageProgram] = []  # the first one, and nothing once that runs
    state: TrainState | None = None
    saved: LoopState | None = None
    left: Sequence[Stage] = stages
    if previous is None:
        ready = [compiled(stages[0])]
        state = _init_state(config, initial, optimizer, abstract, mesh, display)
    # All checks are done: from here on the run directory is written.
    training = config.training
    # A decay that is lengthened may be done again from before it.
    known = (*stages, *(previous.resolved_stages if previous else ()))
    kept = [stage.decay_start for stage in known if stage.decay_start]
    with open_checkpoints(
        config.output,
        training.keep_checkpoints,
        kept,
        keep_best=training.keep_best,
        is_scheduled=config.is_checkpoint_due,
    ) as checkpoints:
        if state is None:
            assert previous is not None
            state, saved = checkpoints.restore(abstract.state, display.say)
            _check_same_data(saved, data, config.output)
            left = _stages_left(stages, saved)
            display.say(_resuming(saved, is_complete=not left))
            if saved.digests.keys() - {TEACHER} != data.digests.keys():
                display.say("other sources than before: the best checkpoint is that of later steps")
                checkpoints.forget_best()
        if left:
            if previous and saved:
                for line in describe_changes(previous, config, saved.step):
                    display.say(line)
            _write_directory(config, data.tokenizer, is_new=previous is None)
            programs = (ready.pop() if ready else compiled(stage) for stage in left)
            state = _run_stages(
                state, saved, config, programs, data.digests, checkpoints, interrupts, display
            )
    if interrupts.agreed:
        return
    if config.training.sample_tokens:
        display.begin("writing a sample")
        graph, _ = abstract_model(stages[-1].run.model, config.compute, mesh, config.adapter)
        text = sample(generate, graph, state.params, data.tokenizer, mesh)
        if is_main_process() and text is not None:
            replace_text(resolve_location(config.output) / SAMPLE_FILE, text)
            display.say(text)
    display.say(f"done: {config.output}")


def _run_stages(
    state: TrainState,
    saved: LoopState | None,
    config: RunConfig,
    programs: Iterator[StageProgram],
    digests: dict[str, str],
    checkpoints: Checkpoints,
    interrupts: Interrupts,
    display: Display,
) -> TrainState:
    """The state after the last stage, or after the step at which the run has to stop.

    Args:
      saved: of the checkpoint that the run resumes from.
      programs: of the stages that are left; each is compiled when its turn comes.
      digests: of the tokens of each source.
    """
    output = resolve_location(config.output) if is_main_process() else None
    trace = output / PROFILE if output and config.profile else None
    step, validation_due = (saved.step, saved.validation_due) if saved else (0, False)
    recorded = RecorderState(**(saved.recorder or {})) if saved else RecorderState()
    stop = config.resolved_stages[-1].stop
    with open_records(output) as records, ExitStack() as opened:
        run = None
        if records.directory:
            before = last_step(records.directory)
            run = record_start(
                config, records.directory, recorded.logged, before, is_resumed=saved is not None
            )
        metrics = MetricsWriter(run, display.say, make_trackers(config.tracking))
        writer = opened.enter_context(metrics)
        tracer = opened.enter_context(Tracer(trace, step, stop))
        recorder = Recorder(stop, config.training.log_every, writer, display, recorded)

        def save(state: TrainState, step: int, validation_due: bool) -> None:
            recorded = recorder.state()
            loop = LoopState(
                step,
                program.digests(digests),
                recorded.skipped,
                validation_due,
                dataclasses.asdict(recorded),
            )
            with recorder.waiting_for("checkpoint"):
                records.flush()
                checkpoints.save(state, loop)

        for program in programs:
            stage = program.stage
            recorder.begin_stage(program.records)
            if stage.name:
                display.say(stage.describe())
            if saved and step > stage.start:
                _check_same_teacher(saved, program)
            if step == stage.start and stage.validated_on != config.stage_at(step).validated_on:
                checkpoints.forget_best()
                recorder.forget_losses()
            with interrupts.deferred():
                if program.reference:
                    display.begin(
                        f"reference log-probabilities of {program.reference.num_pairs:,} pairs"
                    )
                    program.reference.prepare(state.params, step)
                    if interrupts.agreed:
                        break
                state = _run_steps(
                    state,
                    step,
                    program,
                    validation_due=validation_due,
                    is_save_due=config.is_checkpoint_due,
                    save=save,
                    checkpoints=checkpoints,
                    interrupts=interrupts,
                    recorder=recorder,
                    records=records,
                    tracer=tracer,
                    display=display,
                )
            if interrupts.agreed:
                break
            step, validation_due = stage.stop, False
            del program  # with its teacher, before the next stage loads its own
    return state


def _run_steps(
    state: TrainState,
    start: int,
    program: StageProgram,
    *,
    validation_due: bool,
    is_save_due: Callable[[int], bool],
    save: Callable[[TrainState, int, bool], None],
    checkpoints: Checkpoints,
    interrupts: Interrupts,
    recorder: Recorder,
    records: Records,
    tracer: Tracer,
    display: Display,
) -> TrainState:
    """The state after the last step of a stage, or after the one at which the run has to stop.

    Evaluates and saves on schedule, after the last step, and before the learning rate decays.

    Args:
      start: steps done already, of the whole run.
      validation_due: whether the evaluations after them are not.
    """
    stage, evaluations = program.stage, program.evaluations
    batches = program.batches(start - stage.start)
    for step in range(start, stage.stop + 1):
        ends = step == stage.stop
        if step > start:
            with recorder.waiting_for("input"):
                batch = next(batches)
            recorder.collect()
            with tracer.step(step):
                state, metrics = program.train_step(state, batch)
            recorder.submit(step, metrics)
            records.flush_if_due()
            checkpoints.check()
            validation_due = evaluations.are_due(step)
        stops, improves, validated = interrupts.poll(), False, False
        if validation_due and not stops:
            if ends:
                display.begin("validating on all held-out text")
            with recorder.paused():
                evaluated = evaluations.run(state.params, step)
            if evaluated is not None:
                validated = True
                recorder.flush(evaluated)
                improves = checkpoints.improves(step, comparable_loss(evaluated))
            validation_due = stops = evaluated is None
        saves = improves or is_save_due(step) or step == stage.decay_start
        # At the start, the checkpoint is there already, and does not know of this validation.
        if (step > start and (stops or saves)) or (step == start and validated):
            if not validation_due:  # whose line of metrics waits for it
                recorder.flush()
            save(state, step, validation_due)  # not a run that diverged: its metrics are read
        if stops:
            break
    checkpoints.wait()
    return state


def _optimizer(config: RunConfig) -> optax.GradientTransformation:
    """The optimizer of a run, through all of its stages."""
    return make_optimizer(config.training, run_schedule(config))


def _examples(stages: Sequence[Stage], data: Data, seed: int) -> dict[str, Examples]:
    """The training examples of each stage, by its name."""
    read = [
        (stage.run.data, stage.run.training.steps * stage.run.training.batch_size)
        for stage in stages
    ]
    names = (stage.name for stage in stages)
    return dict(zip(names, data.train_examples(read, seed), strict=True))


def _stages_left(stages: Sequence[Stage], saved: LoopState) -> Sequence[Stage]:
    """The stages that are left; none if the run is complete."""
    return [
        stage
        for stage in stages
        if saved.step < stage.stop or (saved.step == stage.stop and saved.validation_due)
    ]


def _find_start(config: RunConfig) -> tuple[RunConfig | None, InitialModel | None]:
    """The run that this one resumes, or the model that it starts from, if there is either."""
    previous = read_run(config.output)
    if previous is not None:
        check_resumes(previous, config, checkpoint_steps(config.output)[-1])
        return previous, None
    if not config.init_from:
        if config.adapter:
            raise HymbaError(
                f"adapter.kind is {config.adapter.kind}, and there is no model to adapt: name one "
                "by init_from"
            )
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
    config = with_local_tokens(run.data_of_all_stages, display)
    output, tokenizer = run.output, None
    formats = source_formats(config, output)
    for stage in run.resolved_stages:
        check_formats(stage, formats)
    if is_resumed:
        tokenizer = Tokenizer.load(output)
    elif initial is not None and (tokenizer := initial.tokenizer_for(config)) is not None:
        display.say(
            f"keeping the tokenizer of {initial.directory}: {config.tokenizer} "
            "would train another one with different ids"
        )
        tokenizer = tokenizer.with_chat_template_of(config.chat_template)
    if is_main_process():
        tokenize_sources(config, tokenizer, output, check, display, trained_on=trained_on(output))
    wait_for_all("tokens")
    check_visible(output, text_manifests(config, output))
    data = open_data(config, tokenizer, output)
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
    # A size asks for a tokenizer to be trained, where neither tokens nor the source model have one.
    name = config.data.tokenizer if config.data.bpe_size is None else "of the data"
    tokenizer.check_fits(model, name)
    positions = config.resolved_stages[-1].run.model.max_positions
    check_sample(training.sample_prompt, training.sample_tokens, tokenizer, positions)
    return model


def _read_teacher(
    stage: Stage, tokenizer: Tokenizer, abstract: AbstractTrainState, mesh: Mesh
) -> Teacher | None:
    """The teacher of a stage, if it has one; its parameters are not read.

    Raises:
      HymbaError: there is no such model, it does not go with the run's, or both do not fit the
        devices.
    """
    teacher = read_teacher(stage.run, mesh)
    if teacher:
        check_teacher(teacher, tokenizer)
        check_memory(abstract, mesh, teacher.abstract)
    return teacher


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
    return initial.load_state(config.model, config.compute, optimizer, abstract, mesh, config.seed)


def _describe_rows(
    stages: Sequence[Stage], examples: Mapping[str, Examples], data: Data
) -> list[str]:
    """The padding of packed rows, and conversations that are left out, in words, a line each."""
    lines = []
    for stage in stages:
        lines += examples[stage.name].padding()
        lines += examples[stage.name].left_out()
        preferences = stage.run.training.objective == "dpo"
        lines += data.validation_left_out(
            stage.run.data, stage.run.training.validate_on, preferences=preferences
        )
    return list(dict.fromkeys(lines))


def _announce(
    config: RunConfig,
    abstract: AbstractTrainState,
    data: Data,
    notes: Sequence[str],
    mesh: Mesh,
    display: Display,
) -> None:
    """Says what is trained, and on what.

    Args:
      notes: on the data.
    """
    devices, stages = jax.devices(), config.resolved_stages
    tokens = sum(stage.tokens for stage in stages)
    text = f", of {data.num_tokens:,} tokens of text" if data.num_tokens else ""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    display.say(
        f"{config.output}: {abstract.num_params:,} parameters in {config.model.num_layers} layers, "
        f"{len(devices)} x {devices[0].device_kind}{processes}; {stages[-1].stop:,} steps, "
        f"{tokens:,} tokens{text}"
    )
    for line in describe_trainable(abstract.trainable, abstract.state.params):
        display.say(line)
    known, rows = data.tokenizer.vocab_size, config.model.num_embeddings
    if known < rows:
        display.say(
            f"{rows - known:,} of {rows:,} rows of the embedding are padding: the tokenizer has "
            f"{known:,} tokens"
        )
    for note in notes:
        display.say(note)
    if mesh.size > 1:
        for length in dict.fromkeys(stage.run.data.sequence_length for stage in stages):
            display.say(describe_sharding(config.model, mesh, length))


def _check_same_data(saved: LoopState, data: Data, output: str) -> None:
    """Raises HymbaError if a checkpoint is of other data.

    Sources that no stage so far has read may have gone.
    """
    for source, digest in saved.digests.items():
        if source != TEACHER and data.digests.get(source, digest) != digest:
            raise HymbaError(
                f"{output}: the {source} has other tokens than those the run was trained on: "
                "restore them, or choose another output"
            )


def _check_same_teacher(saved: LoopState, program: StageProgram) -> None:
    """Raises HymbaError if a checkpoint within a stage is of another teacher."""
    if saved.digests.get(TEACHER) != program.teacher_digest:
        raise HymbaError(
            f"{program.stage.run.distill.teacher}: has other parameters than the teacher of "
            f"{program.stage.label} so far: restore them, or choose another output"
        )


def _resuming(saved: LoopState, *, is_complete: bool) -> str:
    """What a run does that resumes, in words."""
    if is_complete:
        return f"complete at step {saved.step}: raise its steps, or add a stage, to continue"
    return f"resuming after step {saved.step}"


def _write_directory(config: RunConfig, tokenizer: Tokenizer, *, is_new: bool) -> None:
    """Makes the run directory, by the first process for all."""
    if is_main_process():
        write_run_directory(config, tokenizer)
        if is_new:
            keep_hf_files(config.init_from, config.output)
    check_written(config.output)
