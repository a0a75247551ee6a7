"""Keras 3 on JAX: its ResNet-50, trained by `fit` with less memory.

Nothing is downloaded: the weights and the images are random.
"""

import functools
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import report
from jax import ShapeDtypeStruct

import dropit_jax

BATCH, SIZE, CLASSES = 128, 224, 1000


def main() -> None:
    """Prints the tables, and trains."""
    target = report.arguments(__doc__).target

    model = resnet50(32, 10)
    loss, dropped, variables = losses(model)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(10, size=16)
    report.gradients(loss, dropped, *variables, images, labels, None, has_aux=True)

    model.compute_loss_and_updates = dropit_jax.drop(
        model.compute_loss_and_updates, "lean"
    )
    model.fit(images, labels, epochs=4, verbose=2)

    keras.config.set_dtype_policy("mixed_bfloat16")
    loss, dropped, variables = losses(resnet50(SIZE, CLASSES))
    images = ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.float32)
    labels = ShapeDtypeStruct((BATCH,), jnp.int32)
    print(f"ResNet-50, {BATCH} images of {SIZE} x {SIZE}, bfloat16:")
    report.memory_table(
        loss, dropped, *variables, images, labels, None, target=target, has_aux=True
    )


def resnet50(size: int, classes: int) -> keras.Model:
    """Keras's ResNet-50, compiled."""
    model = keras.applications.ResNet50(
        weights=None,
        input_shape=(size, size, 3),
        classes=classes,
        classifier_activation=None,
    )
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", cross_entropy)
    return model


def losses(model: keras.Model):
    """The training loss, by preset what `drop` makes of it, and its variables."""
    loss = functools.partial(
        model.compute_loss_and_updates,
        training=True,
        optimizer_variables=[variable.value for variable in model.optimizer.variables],
    )
    dropped = {preset: dropit_jax.drop(loss, preset) for preset in report.PRESETS}
    variables = jax.tree.map(
        lambda variable: variable.value,
        [
            model.trainable_variables,
            model.non_trainable_variables,
            model.metrics_variables,
        ],
    )
    return loss, dropped, variables


if __name__ == "__main__":
    main()
