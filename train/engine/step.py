"""Makes the training step and the evaluation step of a config: pure functions."""

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
    """The state that a training step updates.

    Attributes:
      step: the number of steps done.
      params: the parameters.
      ema_params: the exponential moving average of the parameters; `{}` if
        `config.ema_decay` is 0.
      batch_stats: the running statistics of the batch norms.
      opt_state: the optimiser's state.
      rng: the data of a PRNG key, which never changes; a step folds its number in.
    """

    step: Int[Array, ""]
    params: Any
    ema_params: Any
    batch_stats: Any
    opt_state: optax.OptState
    rng: UInt32[Array, "words"]

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for evaluation, with averaged parameters if there are any."""
        params = self.ema_params or self.params
        return {"params": params, "batch_stats": self.batch_stats}


def problem(step: int, state: State) -> str:
    """Returns why training cannot resume from a state after a step; "" if it can."""
    if int(jax.device_get(state.step)) != step:
        return f"its state is that of step {state.step}"
    return finite.problem(state)


class Sums(flax.struct.PyTreeNode):
    """Sums over the examples of a batch, without padding.

    Attributes:
      loss: the sum of the losses, in nats.
      correct: the number of examples classified correctly.
      correct_top5: the number of examples with their class among the five likeliest.
      count: the number of examples.
    """

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    correct_top5: Float[Array, ""]
    count: Float[Array, ""]


# (params, batch_stats, batch, key) -> (mean loss, (sums, new batch_stats)).
LossFn = Callable[[Any, Any, data.Batch, Array], tuple[Array, tuple[Sums, Any]]]
# As `LossFn`, with the gradient with respect to the parameters in place of the loss.
GradientFn = Callable[[Any, Any, data.Batch, Array], tuple[Any, tuple[Sums, Any]]]
TrainStep = Callable[[State, data.Batch], tuple[State, Sums]]
EvaluationStep = Callable[[State, data.Batch], Sums]


def create_model(config: ConfigDict) -> nn.Module:
    """Returns the model of a config."""
    name = config.model.name
    return models.create(
        name,
        data.info(config.dataset, config.data_dir).num_classes,
        config.dtype,
        layers=config_lib.model_layers(config),
        remat=config.remat,
        **{field: config.model[field] for field in models.fields(name)},
    )


def create_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimiser of a config."""
    return optim.optimizer(config, optim.schedule(config, *config_lib.steps(config)))


def initial_state(config: ConfigDict) -> State:
    """Returns the state before the first step; `config.seed` is the random seed."""
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
    """Returns the state's shapes and dtypes, as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: initial_state(config))


def initialise(config: ConfigDict, shardings: Any = None) -> State:
    """Returns `initial_state`, computed on the devices that hold it.

    XLA compiles it without optimisation, in a sixth of the time, as it runs once.

    Args:
      config: the config.
      shardings: the sharding of each array of the state, or one sharding for all;
        `None`: JAX's default device.
    """
    init = jax.jit(
        lambda: initial_state(config),
        out_shardings=shardings,
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return init()


def loss(config: ConfigDict) -> LossFn:
    """Returns the loss function of a training step, in `drop` if there is a preset."""
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
    """Returns the gradient function of `loss`, accumulated over parts of a batch."""
    gradient_fn = jax.grad(loss(config), has_aux=True)
    if config.accumulate_steps > 1:
        gradient_fn = accumulate(gradient_fn, config.accumulate_steps)
    return gradient_fn


def train_step(config: ConfigDict) -> TrainStep:
    """Returns the function `(state, batch) -> (new state, sums)`, to jit.

    Donate the state. The sums are computed with the old parameters. Their loss is the
    minimised one, with smoothed labels and mixed images if the config has these.
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
    """Returns the function `(state, batch) -> sums`, of loss and correct answers."""
    model, normalise = create_model(config), pixels.normaliser(config)

    def step(state: State, batch: data.Batch) -> Sums:
        inputs = normalise(batch["image"])
        logits: Any = model.apply(state.variables, inputs, train=False)
        return _sums(logits, batch)

    return step


def abstract(
    config: ConfigDict, batch_size: int | None = None
) -> tuple[TrainStep, tuple[Any, ...]]:
    """Returns the training step of a config and its abstract arguments, to compile it.

    Reads no examples, and allocates no arrays.

    Args:
      config: the config.
      batch_size: the size of a batch, which may exceed the dataset; `None`: the size
        in the config.

    Returns:
      The function to jit, with argument 0, the state, donated; and the arguments, a
      state and a batch, as `jax.ShapeDtypeStruct`s.

    Raises:
      ConfigError: the config cannot be run.
      DataError: the description of the prepared dataset is damaged.
    """
    validation.validate(config, num_devices=None)
    state = abstract_state(config)
    size = batch_size or config.batch_size
    batch = data.Batch(
        image=jax.ShapeDtypeStruct((size, *_image_shape(config)), jnp.uint8),
        label=jax.ShapeDtypeStruct((size,), jnp.int32),
        mask=jax.ShapeDtypeStruct((size,), jnp.float32),
    )
    return train_step(config), (state, batch)


def abstract_images(config: ConfigDict, count: int = 1) -> jax.ShapeDtypeStruct:
    """Returns the model's abstract input, of shape (count, size, size, channels)."""
    return jax.ShapeDtypeStruct((count, *_image_shape(config)), jnp.float32)


def _image_shape(config: ConfigDict) -> tuple[int, int, int]:
    size = config.image_size
    return size, size, data.info(config.dataset, config.data_dir).channels


def _sums(
    logits: Float[Array, "batch classes"],
    batch: data.Batch,
    smoothing: float = 0.0,
    weight: Float[Array, ""] | None = None,
) -> Sums:
    """Returns the sums of a batch.

    Args:
      logits: the model's logits for the batch.
      batch: the batch.
      smoothing: the smoothing of the labels.
      weight: if images are mixed, the weight of image i, in [0.5, 1]; the image at the
        mirrored position, -1 - i, has the rest. The right label is that of image i.
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
