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

from dropit_jax import drop
from train import data, models
from train.config import config as config_lib
from train.config import validation
from train.data import pixels
from train.engine import finite, losses, optim
from train.engine.accumulation import accumulate


class State(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: how many steps have been done.
      params: the parameters.
      ema_params: their exponential moving average; empty if the config has none.
      batch_stats: the running statistics of the batch norms.
      opt_state: the optimiser's state.
      rng: the data of a PRNG key; each step folds its number into it.
    """

    step: Int[Array, ""]
    params: Any
    ema_params: Any
    batch_stats: Any
    opt_state: optax.OptState
    rng: UInt32[Array, "words"]

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is evaluated with: averaged parameters, if there are any."""
        params = self.ema_params or self.params
        return {"params": params, "batch_stats": self.batch_stats}


def problem(step: int, state: State) -> str:
    """Returns why a state is none to go on from after a step; empty if it is one."""
    if int(jax.device_get(state.step)) != step:
        return f"its state is that of step {state.step}"
    return finite.problem(state)


class Sums(flax.struct.PyTreeNode):
    """Sums over the examples of a batch.

    Attributes:
      loss: of the loss, in nats.
      correct: of the examples classified correctly.
      correct_top5: of the examples whose class is among the five likeliest.
      count: of the examples.
    """

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    correct_top5: Float[Array, ""]
    count: Float[Array, ""]


# Of parameters, batch statistics, a batch and a PRNG key; beside the loss, the sums of
# the batch and the new batch statistics.
LossFn = Callable[[Any, Any, data.Batch, Array], tuple[Array, tuple[Sums, Any]]]
# The gradient with respect to the parameters, in place of the loss.
GradientFn = Callable[[Any, Any, data.Batch, Array], tuple[Any, tuple[Sums, Any]]]
TrainStep = Callable[[State, data.Batch], tuple[State, Sums]]
EvaluationStep = Callable[[State, data.Batch], Sums]


def create_model(config: ConfigDict) -> nn.Module:
    """The model that the config describes."""
    name = config.model.name
    return models.create(
        name,
        data.info(config.dataset).num_classes,
        config.dtype,
        layers=config_lib.model_layers(config),
        remat=config.remat,
        **{field: config.model[field] for field in models.fields(name)},
    )


def create_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser that the config describes."""
    return optim.optimizer(config, optim.schedule(config, *config_lib.steps(config)))


def initial_state(config: ConfigDict) -> State:
    """The state before the first step; it depends on `config.seed` alone."""
    params_key, rng = jax.random.split(jax.random.key(config.seed))
    inputs = jnp.zeros((1, *_image_shape(config)))
    variables = create_model(config).init(params_key, inputs, train=False)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        ema_params=variables["params"] if config.ema_decay else {},
        batch_stats=variables.get("batch_stats", {}),
        opt_state=create_optimizer(config).init(variables["params"]),
        rng=jax.random.key_data(rng),
    )


def abstract_state(config: ConfigDict) -> State:
    """The shapes and dtypes of the state."""
    return jax.eval_shape(lambda: initial_state(config))


def initialise(config: ConfigDict, shardings: Any = None) -> State:
    """`initial_state`, computed where it is to be.

    Args:
      config: what is trained.
      shardings: one for each array of the state, or one for all.

    It runs once, so it is compiled without optimisation: in a sixth of the time.
    """
    init = jax.jit(
        lambda: initial_state(config),
        out_shardings=shardings,
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return init()


def loss(config: ConfigDict) -> LossFn:
    """Returns the loss that a training step minimises, with its auxiliary results."""
    model, normalise = create_model(config), pixels.normaliser(config)

    def loss_fn(
        params: Any, batch_stats: Any, batch: data.Batch, rng: Array
    ) -> tuple[Array, tuple[Sums, Any]]:
        dropout, dropit, mixup = jax.random.split(rng, 3)
        inputs, weight = normalise(batch["image"]), None
        if config.mixup:
            weight = losses.mix_weight(mixup, config.mixup)
            inputs = weight * inputs + (1 - weight) * jnp.flip(inputs, axis=0)
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            inputs,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout, "dropit": dropit},
        )
        sums = _sums(logits, batch, config.label_smoothing, weight)
        return sums.loss / sums.count, (sums, updates.get("batch_stats", {}))

    preset = config_lib.preset(config)
    if preset is None:
        return loss_fn
    return drop(loss_fn, preset, key="rng" if preset.needs_key else None)


def gradient(config: ConfigDict) -> GradientFn:
    """Returns the gradient that a training step takes."""
    gradient_fn = jax.grad(loss(config), has_aux=True)
    if config.accumulate_steps > 1:
        gradient_fn = accumulate(gradient_fn, config.accumulate_steps)
    return gradient_fn


def train_step(config: ConfigDict) -> TrainStep:
    """The function that updates the state from a batch.

    It is to be jitted with the state donated. The sums that it returns are of the
    batch before the update; the loss among them is what is minimised, with smoothed
    labels and mixed images where the config asks for them.
    """
    gradient_fn, optimizer = gradient(config), create_optimizer(config)

    def step(state: State, batch: data.Batch) -> tuple[State, Sums]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        gradients, (sums, batch_stats) = gradient_fn(
            state.params, state.batch_stats, batch, rng
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if config.ema_decay:
            weight = 1 - config.ema_decay
            ema_params = optax.incremental_update(params, ema_params, weight)
        state = state.replace(
            step=state.step + 1,
            params=params,
            ema_params=ema_params,
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, sums

    return step


def evaluation_step(config: ConfigDict) -> EvaluationStep:
    """The function that sums loss and correct answers over a batch."""
    model, normalise = create_model(config), pixels.normaliser(config)

    def step(state: State, batch: data.Batch) -> Sums:
        inputs = normalise(batch["image"])
        logits: Any = model.apply(state.variables, inputs, train=False)
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
    validation.validate(config)
    state = abstract_state(config)
    size = batch_size or config.batch_size
    batch = data.Batch(
        image=jax.ShapeDtypeStruct((size, *_image_shape(config)), jnp.uint8),
        label=jax.ShapeDtypeStruct((size,), jnp.int32),
        mask=jax.ShapeDtypeStruct((size,), jnp.float32),
    )
    return train_step(config), (state, batch)


def abstract_images(config: ConfigDict, count: int = 1) -> jax.ShapeDtypeStruct:
    """What the model is called with, for tools that trace it."""
    return jax.ShapeDtypeStruct((count, *_image_shape(config)), jnp.float32)


def _image_shape(config: ConfigDict) -> tuple[int, int, int]:
    size = config.image_size
    return size, size, data.info(config.dataset).channels


def _sums(
    logits: Float[Array, "batch classes"],
    batch: data.Batch,
    smoothing: float = 0.0,
    weight: Float[Array, ""] | None = None,
) -> Sums:
    """The sums of a batch.

    Args:
      logits: of the model.
      batch: what they are of.
      smoothing: of the labels.
      weight: of each image, where it is mixed with the one as far from the end; at
        least a half, so that its label counts as the right one.
    """
    labels, mask = batch["label"], batch["mask"]
    loss = losses.cross_entropy(logits, labels, smoothing)
    if weight is not None:
        other = losses.cross_entropy(logits, jnp.flip(labels), smoothing)
        loss = weight * loss + (1 - weight) * other
    correct = jnp.argmax(logits, axis=-1) == labels
    correct_top5 = losses.is_among_largest(logits, labels, 5)
    return Sums(
        loss=jnp.sum(loss * mask),
        correct=jnp.sum(correct.astype(mask.dtype) * mask),
        correct_top5=jnp.sum(correct_top5.astype(mask.dtype) * mask),
        count=jnp.sum(mask),
    )
