"""Configs, batches, states and compiled steps that the tests of steps share."""

import contextlib
import copy
import functools
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized

from configs import digits_resnet18
from tests.train import commands
from train import data, models
from train.config import config as config_lib
from train.config.config import model_section
from train.engine import step as step_lib


class StepTest(parameterized.TestCase):
    """A test whose ResNet-18 has two stages of one block.

    Compilation takes most of the time of a test.
    """

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.enterClassContext(mock.patch.dict(models._MODELS, commands.SMALL_RESNET))


def resnet_config(memory="baseline", layers="flax", **dropit):
    """Returns the config of a ResNet on small images."""
    config = digits_resnet18.get_config()
    config.memory, config.layers = memory, layers
    config.image_size, config.model.width, config.batch_size = 8, 4, 16
    config.schedule.warmup_epochs = 0.0  # the first step is one already
    config.dropit.update(dropit)
    return config


def layers_config(**dropit):
    """Returns the config of a ResNet of DropIT layers."""
    return resnet_config(layers="dropit", **dropit)


def vit_config(memory="baseline", layers="flax", dropit=(), **model):
    """Returns the config of a ViT, whose examples do not depend on each other."""
    config = resnet_config(memory, layers, **dict(dropit))
    config.model = model_section("vit_mu", patch_size=4, **model)
    return config


def with_plain_sgd(config):
    """Makes the updates of a config the gradients themselves; returns the config."""
    config.optimizer.update(
        learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.0
    )
    return config


@functools.cache
def _arrays(size, batch_size):
    dataset = data.load("digits", "", size, "none")
    batches = data.training_batches(dataset, batch_size, seed=42)
    with contextlib.closing(batches):
        return next(batches)


def batch(config):
    """Returns a copy of the first batch of digits, which a test may change."""
    arrays = _arrays(config.image_size, config.batch_size)
    return jax.tree.map(np.array, arrays)


# What is compiled once serves all tests.
_COMPILED = {}


def once(function):
    """Returns a function that is called once for all configs that are equal."""

    @functools.wraps(function)
    def call(config):
        key = function, config_lib.to_json(config)
        if key not in _COMPILED:
            # A copy: what is traced later must not see later changes.
            _COMPILED[key] = function(copy.deepcopy(config))
        return _COMPILED[key]

    return call


initialise = once(step_lib.initialise)


def initial_state(config):
    """Returns the initial state, which depends on few fields (see test_training)."""
    common = resnet_config()
    common.model, common.seed = config.model, config.seed
    common.ema_decay = 0.9 if config.ema_decay else 0.0
    return initialise(common)


@once
def train_step(config):
    return jax.jit(step_lib.train_step(config))


@once
def evaluation_step(config):
    return jax.jit(step_lib.evaluation_step(config))


@once
def model(config):
    """Returns the jitted model, for images that are normalised already."""
    model = step_lib.create_model(config)

    @functools.partial(jax.jit, static_argnums=3)
    def logits(params, batch_stats, images, train):
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, images, train, mutable=["batch_stats"])[0]

    return logits


def moved_state(config):
    """Returns a state without parameters at a special first value, such as 0."""
    state, rng = initial_state(config), np.random.default_rng(0)
    return state.replace(
        params=jax.tree.map(
            lambda array: (
                np.asarray(array) + np.float32(rng.normal(0, 0.1, array.shape))
            ),
            state.params,
        )
    )


def next_key(state):
    """Returns the PRNG key of the next step."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.rng), int(state.step))


def changed_paths(a, b):
    """Returns the paths of the arrays that differ by more than rounding."""
    pairs = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, x), y in pairs
        if not np.allclose(x, y, rtol=1e-4, atol=1e-5)
    }


def differ(a, b, atol=1e-4):
    """Returns whether two trees differ by more than `atol` anywhere."""
    return any(
        not np.allclose(x, y, rtol=0, atol=atol)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
