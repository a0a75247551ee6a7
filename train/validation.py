"""The check that a config says all that it has to, and nothing else."""

import dataclasses
import difflib
import math
import numbers
from typing import Any

from ml_collections import ConfigDict

from dropit_jax import LAYER_PRESETS, PRESETS, DropIT
from dropit_jax.layer_presets import REMATS
from train import config as config_lib
from train import data, mesh, models
from train.config import ConfigError

_NUMBER = numbers.Real
_COUNT = numbers.Integral

# Every field of a config, with its type. Those of DropIT are checked by DropIT itself.
_FIELDS: dict[str, Any] = {
    "dataset": str,
    "data_dir": str,
    "image_size": _COUNT,
    "augmentation": str,
    "normalise": str,
    "workers": _COUNT,
    "batch_size": _COUNT,
    "accumulate_steps": _COUNT,
    "num_epochs": _COUNT,
    "num_steps": _COUNT,
    "seed": _COUNT,
    "model.name": str,
    "model.width": _COUNT,
    "model.stem": str,
    "model.patch_size": _COUNT,
    "model.pool": str,
    "model.positions": str,
    "model.dropout": _NUMBER,
    "model.drop_path": _NUMBER,
    "model.scan": bool,
    "init_from": str,
    "dtype": str,
    "memory": str,
    "remat": str,
    "drop": str,
    **{f"dropit.{field.name}": object for field in dataclasses.fields(DropIT)},
    "optimizer.learning_rate": _NUMBER,
    "optimizer.momentum": _NUMBER,
    "optimizer.nesterov": bool,
    "optimizer.weight_decay": _NUMBER,
    "optimizer.clip_norm": _NUMBER,
    "schedule.name": str,
    "schedule.warmup_epochs": _NUMBER,
    "schedule.decay_epochs": tuple,
    "schedule.decay_factor": _NUMBER,
    "label_smoothing": _NUMBER,
    "mixup": _NUMBER,
    "ema_decay": _NUMBER,
    "evaluate_every": _NUMBER,
    "checkpoint_steps": _COUNT,
    "profile_steps": tuple,
    "mesh.data": _COUNT,
    "mesh.fsdp": _COUNT,
}
# How long to train is said in one of two units; of both, the second counts.
_EITHER = ("num_epochs", "num_steps")
# What only some models read.
_OF_MODELS = tuple(
    f"model.{field}"
    for field in dict.fromkeys(
        field for name in models.MODELS for field in models.fields(name)
    )
)
# What only one kind of schedule reads.
_OPTIONAL = ("schedule.decay_epochs", "schedule.decay_factor")
# JAX makes a PRNG key of what fits into this type.
_LARGEST_SEED = 2**63 - 1

_CHOICES = {
    "dataset": data.DATASETS,
    "augmentation": data.AUGMENTATIONS,
    "normalise": ("dataset", "unit"),
    "model.name": models.MODELS,
    "model.stem": models.STEMS,
    "model.pool": models.POOLS,
    "model.positions": models.POSITIONS,
    "dtype": ("float32", "bfloat16"),
    "memory": LAYER_PRESETS,
    "remat": REMATS,
    "drop": ("", *PRESETS),
    "schedule.name": ("cosine", "step"),
}
_POSITIVE = (
    "image_size",
    "batch_size",
    "accumulate_steps",
    "num_epochs",
    "num_steps",
    "model.width",
    "model.patch_size",
    "optimizer.learning_rate",
    "schedule.decay_factor",
    "evaluate_every",
)
_NOT_NEGATIVE = (
    "workers",
    "seed",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "schedule.warmup_epochs",
    "mixup",
    "checkpoint_steps",
)
_BELOW_ONE = (
    "optimizer.momentum",
    "model.dropout",
    "model.drop_path",
    "label_smoothing",
    "ema_decay",
)


def validate(config: ConfigDict, num_devices: int = 1) -> None:
    """Checks a config before anything is done with it.

    Args:
      config: the config.
      num_devices: how many devices share a batch.

    Raises:
      ConfigError: a field is unknown, missing, of the wrong type or out of range. The
        message names it, and says what it may be.
    """
    values = config_lib.flat(config)
    _check_names(values)
    for name, value in values.items():
        if not (name in _EITHER and value is None):
            _check_value(name, value)
    _check_model(values)
    _check_decay(values)
    _check_profile(values["profile_steps"])
    config_lib.memory(config)
    _check_mesh(values, num_devices)
    _check_batch(values, num_devices)


def _check_names(values: dict[str, Any]) -> None:
    for name in values:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f" Did you mean config.{near[0]}?" if near else ""
            raise ConfigError(f"config.{name} is not a field that a config has.{hint}")
    if all(values.get(name) is None for name in _EITHER):
        raise ConfigError("A config has config.num_epochs or config.num_steps.")
    for name in _FIELDS:
        if name not in (*values, *_EITHER, *_OPTIONAL, *_OF_MODELS):
            raise ConfigError(f"config.{name} is missing.")


def _check_value(name: str, value: Any) -> None:
    expected = _FIELDS[name]
    is_misused_bool = isinstance(value, bool) and expected in (_NUMBER, _COUNT)
    if not isinstance(value, expected) or is_misused_bool:
        raise ConfigError(
            f"config.{name} must be of type {expected.__name__.lower()}, got {value!r}."
        )
    if name in _CHOICES and value not in _CHOICES[name]:
        known = ", ".join(map(repr, _CHOICES[name]))
        raise ConfigError(f"config.{name}: unknown value {value!r}; known are {known}.")
    if expected is _NUMBER and not math.isfinite(value):
        raise ConfigError(f"config.{name} must be finite, got {value!r}.")
    if name == "seed" and value > _LARGEST_SEED:
        raise ConfigError(f"config.seed must be below 2**63, got {value!r}.")
    if name in _POSITIVE and not value > 0:
        raise ConfigError(f"config.{name} must be above 0, got {value!r}.")
    if name in _NOT_NEGATIVE and not value >= 0:
        raise ConfigError(f"config.{name} must not be negative, got {value!r}.")
    if name in _BELOW_ONE and not 0 <= value < 1:
        raise ConfigError(f"config.{name} must be in [0, 1), got {value!r}.")


def _check_model(values: dict[str, Any]) -> None:
    """Checks that a model has the fields that it reads, and no others."""
    model = values["model.name"]
    wanted = [f"model.{field}" for field in models.fields(model)]
    for name in _OF_MODELS:
        if name in wanted and name not in values:
            raise ConfigError(f"config.{name} is missing: {model!r} needs it.")
        if name in values and name not in wanted:
            raise ConfigError(
                f"config.{name} is not for config.model.name={model!r}, which has "
                f"{', '.join(f'config.{field}' for field in wanted)}."
            )
    size, patch = values["image_size"], values.get("model.patch_size", 1)
    if size % patch:
        raise ConfigError(
            f"config.image_size={size} cannot be cut into patches of "
            f"config.model.patch_size={patch}."
        )


def _check_decay(values: dict[str, Any]) -> None:
    """Checks when the learning rate falls, which the step schedule alone says."""
    epochs = values.get("schedule.decay_epochs", ())
    if not all(
        isinstance(epoch, int | float) and 0 <= epoch < math.inf for epoch in epochs
    ):
        raise ConfigError(
            f"config.schedule.decay_epochs takes numbers of epochs, got {epochs!r}."
        )
    if values["schedule.name"] != "step":
        if epochs:
            raise ConfigError(
                "config.schedule.decay_epochs is for config.schedule.name='step', got "
                f"{epochs!r} beside {values['schedule.name']!r}."
            )
        return
    for name in _OPTIONAL:
        if not values.get(name):
            raise ConfigError(f"config.{name} is missing: the step schedule needs it.")


def _check_profile(steps: tuple[Any, ...]) -> None:
    """Checks which steps are traced: none, or those from a first to before a last."""
    if not steps:
        return
    if not (
        len(steps) == 2
        and all(type(step) is int for step in steps)  # which a bool is not
        and 0 <= steps[0] < steps[1]
    ):
        raise ConfigError(
            "config.profile_steps takes the first step and the one after the last, "
            f"such as (10, 13), got {steps!r}."
        )


def _check_mesh(values: dict[str, Any], num_devices: int) -> None:
    """Checks that the axes of the mesh take all devices."""
    data_axis, fsdp_axis = values["mesh.data"], values["mesh.fsdp"]
    for name, size in (("data", data_axis), ("fsdp", fsdp_axis)):
        if size != -1 and size < 1:
            raise ConfigError(
                f"config.mesh.{name} must be above 0, or -1 for all devices that are "
                f"left, got {size!r}."
            )
    try:
        mesh.shape(data_axis, fsdp_axis, num_devices)
    except ValueError as error:
        raise ConfigError(
            f"config.mesh: {data_axis} x {fsdp_axis} devices are not the {num_devices} "
            "that there are. Set config.mesh.data=-1 for all that are left."
        ) from error


def _check_batch(values: dict[str, Any], num_devices: int) -> None:
    """Checks that a batch can be split, and that the dataset fills one."""
    size, parts = values["batch_size"], values["accumulate_steps"]
    if size % (parts * num_devices):
        split = f"{num_devices} devices"
        if parts > 1:
            split = f"config.accumulate_steps={parts} steps of {split}"
        raise ConfigError(
            f"config.batch_size={size} cannot be split evenly over {split}: make it a "
            f"multiple of {parts * num_devices}."
        )
    examples = data.info(values["dataset"], values["data_dir"]).train_examples
    if size > examples:
        raise ConfigError(
            f"config.batch_size={size} is more than the {examples} training examples "
            f"of {values['dataset']!r}."
        )
