"""A training run, from top to bottom."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from hymba_jax.data import Data, Tokenizer, prepare, train_iterator, validation_batches
from hymba_jax.distributed import is_first
from hymba_jax.errors import HymbaError
from hymba_jax.files import replace_text
from hymba_jax.hf_files import keep_hf_files
from hymba_jax.model.flops import training_flops
from hymba_jax.run_config import RunConfig, read_model_directory
from hymba_jax.sharding import (
    batch_sharding,
    describe_split,
    make_mesh,
    own_rows,
    place_rows,
    replicated,
)
from hymba_jax.training.capacity import check_memory
from hymba_jax.training.checkpoint import Checkpoints, LoopState
from hymba_jax.training.display import Display
from hymba_jax.training.init_from import (
    check_start,
    check_start_tokenizer,
    describe_start,
    start_state,
    start_tokenizer,
)
from hymba_jax.training.metrics import MetricsWriter
from hymba_jax.training.mfu import Workload, peak_flops
from hymba_jax.training.optimizer import make_optimizer
from hymba_jax.training.profile import FOLDER as PROFILE
from hymba_jax.training.profile import Tracer
from hymba_jax.training.recorder import Recorder
from hymba_jax.training.run_directory import (
    check_data,
    check_output,
    check_processes,
    check_written,
    fingerprint,
    is_resumed,
    write_run_directory,
)
from hymba_jax.training.run_lock import locked
from hymba_jax.training.sample import check_tokenizer, sample
from hymba_jax.training.state import Params, abstract_train_state, init_state
from hymba_jax.training.step import check_batch, compile_train_step, make_eval_step

SAMPLE_FILE = "sample.txt"  # inside the run directory


def train(config: RunConfig) -> None:
    """Trains a model, or resumes the run in the run directory; writes a sample at the end.

    Raises:
      HymbaError: the run cannot be what the config says, cannot be written, or diverged.
    """
    check_output(config)
    check_processes(config)
    mesh = make_mesh(parallel=config.parallel)
    # A process that is lost takes the others with it, and there they could not restore a terminal.
    display = Display(plain=jax.process_count() > 1, quiet=not is_first())
    lock = locked(Path(config.output), display.say) if is_first() else nullcontext()
    with display, lock, jax.set_mesh(mesh):
        _train(config, mesh, display)


def _train(config: RunConfig, mesh: Mesh, display: Display) -> None:
    training, length = config.training, config.data.sequence_length
    check_batch(training, mesh)
    resumed = is_resumed(config)
    tokenizer = Tokenizer.load(config.output) if resumed else None
    if config.init_from and not resumed:
        check_start(config)
        tokenizer = start_tokenizer(config)
        if tokenizer is not None:
            display.say(
                f"keeping the tokenizer of {config.init_from}: {config.data.tokenizer} would train "
                "another, whose ids have other meanings"
            )
    display.begin("reading and tokenizing")
    data = prepare(
        config.data,
        tokenizer,
        lambda done, total: display.update(f"tokenizing, {done / total:.0%}"),
        config.output,
    )
    vocabulary = data.tokenizer.vocab_size
    parameters = config.output if resumed else config.init_from
    embeddings = read_model_directory(parameters)[0].num_embeddings if parameters else vocabulary
    config = dataclasses.replace(config, model=config.model.with_vocabulary(embeddings))
    check_tokenizer(config, data.tokenizer)
    if config.init_from and not resumed:
        check_start_tokenizer(config, data.tokenizer)
    if vocabulary < config.model.num_embeddings:
        display.say(
            f"{config.model.num_embeddings - vocabulary:,} of {config.model.num_embeddings:,} rows "
            f"of the embedding are padding: the tokenizer has {vocabulary:,} tokens"
        )
    check_data(data)
    batch_size, micro_batch_size = training.batch_size, training.micro_batch_size
    rows = own_rows(mesh, batch_size)
    batches = train_iterator(data.train, length, batch_size, config.seed, rows)
    corpus = fingerprint(data.train)
    validation = f"{fingerprint(data.validation)} of {data.validation_bytes} bytes"

    optimizer = make_optimizer(training)
    abstract = abstract_train_state(config.model, config.compute, optimizer, mesh)
    check_memory(abstract, mesh)
    display.say(_headline(config, abstract.num_params, data))
    if data.left_out:
        display.say(f"{config.data.path}: left out of the text: {data.left_out}")
    if mesh.size > 1:
        display.say(describe_split(config.model, mesh, length))
    display.begin("compiling")
    place = batch_sharding(mesh)
    train_step = compile_train_step(abstract, optimizer, training, length, place)
    eval_step = jax.jit(make_eval_step(abstract.graph))
    if config.init_from and not resumed:
        display.say(describe_start(config))
        state = start_state(config, optimizer, abstract, mesh)
    elif not resumed:
        state = init_state(config.model, config.compute, optimizer, abstract, config.seed)

    # Whatever is refused was refused before this, which makes the run directory.
    with Checkpoints(config.output, training.keep_checkpoints) as checkpoints:
        if resumed:
            state, loop = checkpoints.restore(abstract.state)
            for side, before, now in (
                ("training", loop.corpus, corpus),
                ("validation", loop.validation, validation),
            ):
                if before != now:
                    raise HymbaError(
                        f"{config.output}: had other {side} text than data.path holds now: bring "
                        "that text back, or choose another output"
                    )
            if loop.step > training.steps:
                raise HymbaError(
                    f"{config.output}: is at step {loop.step}, training.steps is {training.steps}: "
                    "set more steps, or choose another output"
                )
            batches.set_state(loop.batches)
            done = loop.step == training.steps
            display.say(
                f"complete at step {loop.step}: more training.steps would continue it"
                if done
                else f"resuming after step {loop.step}"
            )
        else:
            loop = LoopState(0, batches.get_state(), corpus, validation)
        if is_first():
            write_run_directory(config, data.tokenizer)
            if not resumed:
                keep_hf_files(config.init_from, config.output)
        check_written(config)

        def validate(params: Params, limit: int | None) -> dict[str, float]:
            rows = own_rows(mesh, micro_batch_size)
            batches = validation_batches(data.validation, length, micro_batch_size, limit, rows)
            losses = [
                eval_step(params, place_rows(batch, mesh, micro_batch_size)) for batch in batches
            ]
            nats = sum(float(loss.nats) for loss in losses)
            nats /= sum(int(loss.tokens) for loss in losses)
            return {"validation_loss": nats, "validation_bits_per_byte": data.bits_per_byte(nats)}

        output = Path(config.output) if is_first() else None
        trace = output / PROFILE if output and config.profile else None
        with MetricsWriter(output, loop.step) as writer, Tracer(trace, loop.step) as tracer:
            if writer.removed:
                display.say(writer.removed)
            workload = _workload(config, abstract.state.params, mesh)
            steps_per_epoch = (len(data.train) - 1) // length / batch_size
            recorder = Recorder(training, workload, steps_per_epoch, loop.step, writer, display)
            for step in range(loop.step + 1, training.steps + 1):
                with recorder.waiting_for("input"):
                    batch = place_rows(next(batches), mesh, batch_size)
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
                        limit = None if last else training.validation_batches * batch_size
                        validated = validate(state.params, limit)
                    recorder.flush(validated)
                if last or step % training.checkpoint_every == 0:
                    # A run that diverged stops here, before it is saved. The line of metrics ends
                    # here, too: the next one is whole in a run that resumes from this checkpoint.
                    recorder.flush(log=True)
                    with recorder.waiting_for("checkpoint"):
                        loop = LoopState(step, batches.get_state(), corpus, validation)
                        checkpoints.save(state, loop)

    if training.sample_tokens:
        display.begin("writing a sample")
        whole = jax.device_put(state.params, replicated(mesh))  # by all processes together
        if is_first():
            alone = make_mesh(jax.devices()[:1])  # as whoever loads the model will run it
            with jax.set_mesh(alone):
                own = jax.tree.map(lambda array: array.addressable_data(0), whole)
                params = jax.device_put(own, replicated(alone))
                text = sample(config, nnx.merge(abstract.graph, params), data.tokenizer)
            replace_text(Path(config.output) / SAMPLE_FILE, text)
            display.say(text)
    display.say(f"done: {config.output}")


def _workload(config: RunConfig, params: Params, mesh: Mesh) -> Workload:
    rows, length = config.training.batch_size, config.data.sequence_length
    return Workload(
        tokens=rows * length,
        flops=rows * training_flops(config.model, params, length),
        devices=mesh.size,
        peak_flops=peak_flops([device.device_kind for device in mesh.devices.flat]),
    )


def _headline(config: RunConfig, num_params: int, data: Data) -> str:
    training, devices = config.training, jax.devices()
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{config.output}: {num_params:,} parameters in {config.model.num_layers} layers, "
        f"{len(devices)} x {devices[0].device_kind}{processes}; {training.steps:,} steps of "
        f"{training.batch_size * config.data.sequence_length:,} tokens, "
        f"{len(data.train):,} tokens of text"
    )
