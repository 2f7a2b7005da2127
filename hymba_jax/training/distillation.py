"""The objective of distillation, and its teacher."""

import dataclasses
from dataclasses import dataclass

from flax import nnx
from jax.sharding import Mesh

from hymba_jax.config import ComputeConfig
from hymba_jax.config.run import RunConfig, rotation_problems
from hymba_jax.convert.init_from import InitialModel, read_initial_model
from hymba_jax.data import IGNORED_TARGET, Batch
from hymba_jax.errors import HymbaError
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import Params, abstract_model
from hymba_jax.ops.chunked_logits import Projection
from hymba_jax.ops.distillation import distillation
from hymba_jax.parallel.mesh import AnyMesh
from hymba_jax.tokenizer import Tokenizer
from hymba_jax.training.loss import Average, Averages


def distillation_loss(
    model: Hymba, batch: Batch, teacher: Hymba, temperature: float, weight: float
) -> Averages:
    """The objective of distillation, as `DistillConfig` has it, and its terms.

    `cross_entropy` is that of next-token prediction, and `divergence` KL(p || q), both in nats per
    token. The averages are over the positions whose target is not IGNORED_TARGET.
    """
    valid = batch.targets != IGNORED_TARGET
    total = distillation(
        _logits(model, batch),
        _logits(teacher, batch),
        batch.targets,
        valid,
        temperature=temperature,
        weight=weight,
    )
    sums = {
        "loss": total.loss,
        "cross_entropy": total.nats.sum(),
        "divergence": total.divergence.sum(),
    }
    return {name: Average(value, valid.sum()) for name, value in sums.items()}


def _logits(model: Hymba, batch: Batch) -> Projection:
    kernel = model.output_projection
    x = model.last_hidden_state(batch.inputs, batch.segment_ids)
    return Projection(x, kernel[...], kernel.get_metadata("axes"))


@dataclass(frozen=True)
class Teacher:
    """The teacher of a run.

    Attributes:
      source: where it is.
      compute: how it computes: as the run, with parameters in the compute dtype.
      graph: its model without parameters.
      abstract: shape, dtype and sharding of these.
    """

    source: InitialModel
    compute: ComputeConfig
    graph: nnx.GraphDef[Hymba]
    abstract: Params

    def load(self, mesh: Mesh) -> Params:
        """Its parameters, each shard on the device that holds it."""
        return self.source.load_params(self.source.config, self.compute, mesh)


def read_teacher(
    run: RunConfig, mesh: AnyMesh, source: InitialModel | None = None
) -> Teacher | None:
    """The teacher of a run without stages, if its objective has one; its parameters are not read.

    Args:
      source: the teacher, in place of the model that `distill.teacher` names.

    Raises:
      HymbaError: there is no such model, or it has other shapes of logits.
    """
    if run.training.objective != "distill":
        return None
    source = source or read_initial_model(run.distill.teacher)
    own, wanted = source.config.num_embeddings, run.model.num_embeddings
    if own != wanted:
        raise HymbaError(
            f"{source.directory}: the teacher's vocabulary has {own:,} rows, that of the model "
            f"{wanted:,}: choose a teacher with the same tokenizer, or set model.vocab_size {own}"
        )
    if run.data.sequence_length > source.config.max_positions:
        raise HymbaError(
            f"{source.directory}: the teacher has {source.config.max_positions:,} positions, "
            f"data.sequence_length is {run.data.sequence_length:,}: shorten it"
        )
    if problems := [*rotation_problems(source.config, run.data)]:
        raise HymbaError(f"{source.directory}: the teacher's {problems[0]}")
    compute = dataclasses.replace(run.compute, param_dtype=run.compute.dtype, remat="none")
    graph, abstract = abstract_model(source.config, compute, mesh)
    return Teacher(source, compute, graph, abstract)


def check_teacher(teacher: Teacher, tokenizer: Tokenizer) -> None:
    """Raises HymbaError if the teacher's ids are not those of a tokenizer."""
    own = teacher.source.tokenizer
    if own is not None and own.text_fingerprint != tokenizer.text_fingerprint:
        directory = teacher.source.directory
        raise HymbaError(
            f"{directory}: the teacher's tokenizer is another than the run's, so its ids stand for "
            f"other tokens: use --data.tokenizer {directory}, or another teacher"
        )
