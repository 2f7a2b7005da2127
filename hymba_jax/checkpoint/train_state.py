"""What training changes, as plain trees: abstract, initialized, and placed on devices."""

from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import NamedSharding

from hymba_jax.config import ComputeConfig, HymbaConfig
from hymba_jax.model import Hymba
from hymba_jax.model.abstract import Params, abstract_model, with_sharding
from hymba_jax.model.lora import reset_magnitudes
from hymba_jax.model.trainable import TRAIN_ALL, Trainable, join
from hymba_jax.parallel.mesh import AnyMesh, replicated


class TrainState(NamedTuple):
    """Everything that an update changes, and the parameters that it does not.

    Attributes:
      optimizer: its state, for the trained parameters alone.
    """

    params: Params
    optimizer: optax.OptState


class AbstractTrainState(NamedTuple):
    """A training state without its values.

    Attributes:
      graph: the model without its parameters; `nnx.merge(graph, params)` is the model.
      state: shape, dtype and sharding of every array.
      trainable: which of the parameters are trained.
    """

    graph: nnx.GraphDef[Hymba]
    state: TrainState
    trainable: Trainable = TRAIN_ALL

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda array: array.sharding, self.state)

    @property
    def num_params(self) -> int:
        return sum(array.size for array in jax.tree.leaves(self.state.params))

    @property
    def num_trained(self) -> int:
        trained, _ = self.trainable.split(self.state.params)
        return sum(array.size for array in jax.tree.leaves(trained))

    def init_optimizer(self, optimizer: optax.GradientTransformation, params: Params) -> Any:
        """The state of an optimizer before the first update of these parameters."""
        return optimizer.init(self.trainable.split(params)[0])


def abstract_train_state(
    config: HymbaConfig,
    compute: ComputeConfig,
    optimizer: optax.GradientTransformation,
    mesh: AnyMesh,
    trainable: Trainable = TRAIN_ALL,
) -> AbstractTrainState:
    """The training state of this architecture on this mesh; computes nothing.

    Raises:
      HymbaError: a name pattern of `trainable` matches no parameter, or nothing is trained.
    """
    graph, params = abstract_model(config, compute, mesh, trainable.adapter)
    trainable.check(params)
    moments = jax.eval_shape(optimizer.init, trainable.split(params)[0])
    shardings = _moment_shardings(moments, params, replicated(mesh))
    moments = jax.tree.map(with_sharding, moments, shardings)
    return AbstractTrainState(graph, TrainState(params, moments), trainable)


def _moment_shardings(
    moments: optax.OptState, params: Params, otherwise: NamedSharding
) -> optax.OptState:
    """Shardings of an optimizer's state: for each array that of its parameter, if it has one.

    Optimizers keep trees of the parameters' structure, of which they may mask some: an array
    belongs to the parameter at whose path its own path ends, if both have one shape.
    """
    known = dict(jax.tree.leaves_with_path(params))

    def sharding(path: tuple[Any, ...], array: jax.ShapeDtypeStruct) -> NamedSharding:
        for start in range(len(path)):  # the longest first
            param = known.get(path[start:])
            if param is not None and param.shape == array.shape:
                return param.sharding
        return otherwise

    return jax.tree.map_with_path(sharding, moments)


def init_state(
    config: HymbaConfig,
    compute: ComputeConfig,
    optimizer: optax.GradientTransformation,
    abstract: AbstractTrainState,
    seed: int,
) -> TrainState:
    """Initializes the state of an untrained model, each shard on the device that holds it."""

    def init(key: jax.Array) -> TrainState:
        model = Hymba(config, compute, nnx.Rngs(key), abstract.trainable.adapter)
        params = nnx.to_pure_dict(nnx.state(model))
        return TrainState(params, abstract.init_optimizer(optimizer, params))

    return jax.jit(init, out_shardings=abstract.shardings)(jax.random.key(seed))


def init_state_from(
    params: Params,
    config: HymbaConfig,
    compute: ComputeConfig,
    optimizer: optax.GradientTransformation,
    abstract: AbstractTrainState,
    seed: int,
) -> TrainState:
    """The state of a model with these parameters, which are donated, and a new adapter if any."""
    adapter = abstract.trainable.adapter

    def init(params: Params, key: jax.Array) -> TrainState:
        if adapter:
            graph, fresh = nnx.split(Hymba(config, compute, nnx.Rngs(key), adapter))
            model = nnx.merge(graph, join(nnx.to_pure_dict(fresh), params))
            reset_magnitudes(model)
            params = nnx.to_pure_dict(nnx.state(model))
        return TrainState(params, abstract.init_optimizer(optimizer, params))

    jitted = jax.jit(init, out_shardings=abstract.shardings, donate_argnums=0)
    return jitted(params, jax.random.key(seed))
