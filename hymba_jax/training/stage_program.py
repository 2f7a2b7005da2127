"""What the steps of a stage need, compiled: a run without stages is one."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from hymba_jax.checkpoint.checksums import digest, tree_checksums
from hymba_jax.checkpoint.train_state import AbstractTrainState, TrainState
from hymba_jax.config.run import RunConfig
from hymba_jax.config.stages import Stage
from hymba_jax.data import Batch, Data, ValidationSet, train_batches
from hymba_jax.data.batch import abstract_batch
from hymba_jax.data.examples import Examples
from hymba_jax.data.preference_rows import PreferenceRows
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import Params, abstract_model
from hymba_jax.model.flops import forward_flops, training_flops
from hymba_jax.model.trainable import trainable_of
from hymba_jax.parallel.mesh import batch_sharding, global_batch, process_rows
from hymba_jax.training.distillation import Teacher
from hymba_jax.training.evaluation import Evaluation, Evaluations
from hymba_jax.training.fixed_order import in_fixed_order
from hymba_jax.training.interrupts import Interrupts
from hymba_jax.training.loss import Averages, LossFn, Objective, make_loss_fn
from hymba_jax.training.mfu import Workload, peak_flops
from hymba_jax.training.objectives import has_reference
from hymba_jax.training.preference import answer_log_probs
from hymba_jax.training.recorder import StageRecords
from hymba_jax.training.reference import Reference
from hymba_jax.training.step import Metrics, compile_train_step, run_step
from hymba_jax.training.validation import compile_eval_step, make_validate
from hymba_jax.types import Array, Float

TEACHER = "teacher"
"""Names its parameters among the digests of a checkpoint."""


class StageProgram(NamedTuple):
    """A stage that is ready to run.

    Attributes:
      evaluations: validation, and those that a program adds.
      batches: the global batches from the one on that so many of the stage are before.
      reference: to be prepared before them, if the objective has one.
      teacher_digest: tells the parameters of a teacher from others, if there is one.
      records: what metrics say of its steps.
    """

    stage: Stage
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluations: Evaluations
    batches: Callable[[int], Iterator[Batch]]
    records: StageRecords
    reference: Reference | None = None
    teacher_digest: str | None = None

    def digests(self, of_data: dict[str, str]) -> dict[str, str]:
        """What a checkpoint has to tell what it depends on from others."""
        return of_data | ({TEACHER: self.teacher_digest} if self.teacher_digest else {})


class CompiledSteps(NamedTuple):
    """The model without its parameters, and the compiled training step and loss of a stage."""

    graph: nnx.GraphDef[Hymba]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: LossFn


def compile_stage(
    stage: Stage,
    examples: Examples,
    data: Data,
    teacher: Teacher | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    abstract: AbstractTrainState,
    evaluations: Sequence[Evaluation],
    mesh: Mesh,
    interrupts: Interrupts,
    compiled: dict[Hashable, CompiledSteps],
) -> StageProgram:
    """Compiles the training step and the validation of a stage.

    Args:
      examples: of the stage, from its first on.
      teacher: of the objective, if it has one; its parameters are read here.
      abstract: the state, which is the same in all stages.
      evaluations: beside validation.
      compiled: the steps of the stages before, which are shared; takes those of this one.
    """
    run, training = stage.run, stage.run.training
    if stage.compiled_for not in compiled:
        compiled[stage.compiled_for] = _compile_steps(
            run, objective, optimizer, abstract, mesh, teacher
        )
    steps = compiled[stage.compiled_for]
    given = (teacher.load(mesh),) if teacher else ()
    sets = data.validation_sets(
        run.data, training.validate_on, preferences=training.objective == "dpo"
    )
    validate = make_validate(
        lambda params, batch: steps.eval_step(params, batch, *given),
        sets,
        mesh,
        training.micro_batch_size,
        training.validation_sequences,
        interrupts.poll,
    )
    rows = process_rows(mesh, training.batch_size)

    def batches(start: int) -> Iterator[Batch]:
        own = train_batches(examples, training.batch_size, start, rows)
        return map(partial(global_batch, mesh=mesh, batch_size=training.batch_size), own)

    length = run.data.sequence_length
    flops = training_flops(run.model, length, trainable_of(run))
    if teacher:
        flops += forward_flops(teacher.source.config, length, predicted=length)
    return StageProgram(
        stage,
        lambda state, batch: steps.train_step(state, batch, *given),
        Evaluations(
            validate, training.validate_every, evaluations, steps.graph, stage.stop, interrupts.poll
        ),
        batches,
        _records(stage, examples, flops, mesh),
        _reference(stage, examples, sets, data, steps.graph, mesh, interrupts),
        digest(tree_checksums(given)) if given else None,
    )


def _reference(
    stage: Stage,
    examples: Examples,
    sets: Mapping[str, ValidationSet],
    data: Data,
    graph: nnx.GraphDef[Hymba],
    mesh: Mesh,
    interrupts: Interrupts,
) -> Reference | None:
    """The reference of a stage, if its objective has one."""
    if not has_reference(stage.run):
        return None
    rows = {f"training source {name}": each for name, each in examples.rows.items()}
    rows |= {f"validation source {name}": each.rows for name, each in sets.items()}
    pairs = {name: each for name, each in rows.items() if isinstance(each, PreferenceRows)}

    def log_probs(params: Params, batch: Batch) -> Float[Array, "batch pairs 2"]:
        return jnp.stack(answer_log_probs(nnx.merge(graph, params), batch), -1)

    return Reference(
        stage,
        log_probs,
        pairs,
        {name: data.digests[name] for name in pairs},
        mesh,
        stage.run.training.micro_batch_size,
        interrupts.poll,
    )


def _compile_steps(
    run: RunConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    abstract: AbstractTrainState,
    mesh: Mesh,
    teacher: Teacher | None,
) -> CompiledSteps:
    # The architecture differs between stages in what has no parameters: positions.
    graph, _ = abstract_model(run.model, run.compute, mesh, run.adapter)
    train_step, batch = run_step(
        run, objective, graph, optimizer, mesh, teacher.graph if teacher else None
    )
    validation_batch = abstract_batch(
        run.training.micro_batch_size,
        run.data.sequence_length,
        batch_sharding(mesh),
        segment_ids=run.data.validation_packing == "documents",
        reference=has_reference(run),
    )
    given = (teacher.abstract,) if teacher else ()
    loss_fn = make_loss_fn(objective, graph, teacher.graph if teacher else None)
    if run.training.reduction_shards:
        loss_fn = _in_fixed_order(loss_fn, run.training.reduction_shards)
    return CompiledSteps(
        graph,
        compile_train_step(train_step, abstract.state, batch, *given),
        compile_eval_step(loss_fn, abstract.state.params, validation_batch, *given),
    )


def _in_fixed_order(loss_fn: LossFn, shards: int) -> LossFn:
    """The loss, its batch computed and summed shard by shard."""

    def of_all(params: Params, batch: Batch) -> Averages:
        return loss_fn(params["model"], batch, *params["teacher"])

    summed = in_fixed_order(of_all, shards)
    return lambda params, batch, *teacher: summed({"model": params, "teacher": teacher}, batch)


def _records(stage: Stage, examples: Examples, flops: float, mesh: Mesh) -> StageRecords:
    """What metrics say of the steps of a stage, each of whose sequences needs so many FLOPs."""
    batch_size = stage.run.training.batch_size

    def first_example(step: int) -> int:
        return (step - stage.start - 1) * batch_size

    return StageRecords(
        name=stage.name,
        start=stage.start,
        tokens_before=stage.tokens_before,
        workload=Workload(
            tokens=stage.tokens_per_step,
            flops=batch_size * flops,
            devices=mesh.size,
            peak_flops=peak_flops([device.device_kind for device in mesh.devices.flat]),
        ),
        data_progress=lambda step: examples.progress(first_example(step + 1)),
        name_data=lambda step: examples.describe(first_example(step), first_example(step + 1)),
    )
