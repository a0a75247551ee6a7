"""One training step and one evaluation step, as pure functions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32
from ml_collections import ConfigDict

from train import config as config_lib
from train import data, models, optim


class State(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: how many steps have been done.
      params: the parameters.
      batch_stats: the running statistics of the batch norms.
      opt_state: the optimiser's state.
      rng: the data of a PRNG key; each step folds its number into it.
    """

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    rng: UInt32[Array, "words"]


class Sums(flax.struct.PyTreeNode):
    """Sums over the examples of a batch.

    Attributes:
      loss: of the cross-entropy, in nats.
      correct: of the examples classified correctly.
      count: of the examples.
    """

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    count: Float[Array, ""]


TrainStep = Callable[[State, data.Batch], tuple[State, Sums]]
EvaluationStep = Callable[[State, data.Batch], Sums]


def create_model(config: ConfigDict) -> nn.Module:
    """The model that the config describes."""
    name = config.model.name
    return models.create(
        name,
        data.info(config.dataset).num_classes,
        config_lib.memory(config),
        **{field: config.model[field] for field in models.fields(name)},
    )


def create_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser that the config describes."""
    return optim.optimizer(config, optim.schedule(config, *config_lib.steps(config)))


def initial_state(config: ConfigDict) -> State:
    """The state before the first step; it depends on `config.seed` alone."""
    params_key, rng = jax.random.split(jax.random.key(config.seed))
    images = jnp.zeros((1, *_image_shape(config)))
    variables = create_model(config).init(params_key, images, train=False)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=create_optimizer(config).init(variables["params"]),
        rng=jax.random.key_data(rng),
    )


def initialise(
    config: ConfigDict, sharding: jax.sharding.Sharding | None = None
) -> State:
    """`initial_state`, computed on the devices of a sharding.

    It runs once, so it is compiled without optimisation: in a sixth of the time.
    """
    init = jax.jit(
        lambda: initial_state(config),
        out_shardings=sharding,
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return init()


def train_step(config: ConfigDict) -> TrainStep:
    """The function that updates the state from a batch.

    It is to be jitted with the state donated. The sums that it returns are of the
    batch before the update.
    """
    model, optimizer = create_model(config), create_optimizer(config)

    def step(state: State, batch: data.Batch) -> tuple[State, Sums]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        dropout, dropit = jax.random.split(rng)

        def loss_fn(params: Any) -> tuple[Array, tuple[Sums, Any]]:
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout, "dropit": dropit},
            )
            sums = _sums(logits, batch)
            return sums.loss / sums.count, (sums, updates["batch_stats"])

        gradient_fn = jax.grad(loss_fn, has_aux=True)
        gradients, (sums, batch_stats) = gradient_fn(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, sums

    return step


def evaluation_step(config: ConfigDict) -> EvaluationStep:
    """The function that sums loss and correct answers over a batch."""
    model = create_model(config)

    def step(state: State, batch: data.Batch) -> Sums:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits: Any = model.apply(variables, batch["image"], train=False)
        return _sums(logits, batch)

    return step


def abstract(
    config: ConfigDict, batch_size: int | None = None
) -> tuple[TrainStep, tuple[Any, ...]]:
    """The train step of a config and its arguments, for tools that compile it.

    Args:
      config: what is trained.
      batch_size: of the step; `None`: the config's. It may be more than the dataset
        has.

    Returns:
      The function to jit (argument 0, the state, is donated in training), and its
      arguments as `jax.ShapeDtypeStruct`s. Nothing is read and nothing is allocated.

    Raises:
      ConfigError: the config cannot be run.
    """
    config_lib.validate(config)
    state = jax.eval_shape(lambda: initial_state(config))
    size = batch_size or config.batch_size
    batch = data.Batch(
        image=jax.ShapeDtypeStruct((size, *_image_shape(config)), jnp.float32),
        label=jax.ShapeDtypeStruct((size,), jnp.int32),
        mask=jax.ShapeDtypeStruct((size,), jnp.float32),
    )
    return train_step(config), (state, batch)


def _image_shape(config: ConfigDict) -> tuple[int, int, int]:
    size = config.image_size
    return size, size, data.info(config.dataset).channels


def _sums(logits: Float[Array, "batch classes"], batch: data.Batch) -> Sums:
    labels, mask = batch["label"], batch["mask"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = jnp.argmax(logits, axis=-1) == labels
    return Sums(
        loss=jnp.sum(losses * mask),
        correct=jnp.sum(correct * mask),
        count=jnp.sum(mask),
    )
