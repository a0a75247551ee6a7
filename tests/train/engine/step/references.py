"""Losses, sums and gradients that NumPy computes, or Flax and optax alone."""

import jax
import numpy as np
import optax

from tests.train.engine.step import steps
from train import data
from train.engine import step as step_lib


def normalised(batch, config):
    """Returns the images as the model takes them."""
    info, pixels = data.info(config.dataset), np.float64(batch["image"])
    if config.normalise == "unit":
        return np.float32(pixels / 127.5 - 1)
    return np.float32((pixels - info.mean) / info.std)


def logits(config, state, batch, train):
    """Returns the logits of the images, with parameters of the state."""
    images = normalised(batch, config)
    return np.asarray(
        steps.model(config)(state.params, state.batch_stats, images, train)
    )


def losses(logits, labels, smoothing=0.0):
    """Returns the loss of each example, in float64: `(n, classes) -> (n,)`."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)) + top
    classes = logits.shape[-1]
    wanted = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    return (wanted * (log_z - logits)).sum(axis=-1)


def sums(logits, batch, smoothing=0.0):
    """Returns the `Sums` of a step, over the examples that are not padding."""
    found_losses = losses(logits, batch["label"], smoothing)
    order = np.argsort(-logits, axis=-1)
    found = order == batch["label"][:, None]
    real = batch["mask"] > 0
    return step_lib.Sums(
        loss=np.float32(found_losses[real].sum()),
        correct=np.float32(found[real, :1].sum()),
        correct_top5=np.float32(found[real, :5].sum()),
        count=np.float32(real.sum()),
    )


def by_hand(config, params, batch_stats, batch, key):
    """Returns gradients, mean loss and batch statistics, by Flax and optax alone."""
    dropout, dropit, _ = jax.random.split(key, 3)
    (loss, batch_stats), gradients = _gradient(config)(
        params,
        batch_stats,
        normalised(batch, config),
        batch["label"],
        {"dropout": dropout, "dropit": dropit},
    )
    return gradients, loss, batch_stats


@steps.once
def _gradient(config):
    model = step_lib.create_model(config)

    def loss_fn(params, batch_stats, images, labels, rngs):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(
            variables, images, True, mutable=["batch_stats"], rngs=rngs
        )
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, 10), config.label_smoothing)
        losses = optax.softmax_cross_entropy(logits, wanted)
        return losses.mean(), updates.get("batch_stats", {})

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
