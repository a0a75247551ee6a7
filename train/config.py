"""What a config may say, and the check that it says that and nothing else."""

import copy
import dataclasses
import difflib
import json
import math
import numbers
from typing import Any

from ml_collections import ConfigDict, FieldReference

from dropit_jax import PRESETS, DropIT, Preset, preset
from dropit_jax.presets import REMATS
from train import data, models

_NUMBER = numbers.Real
_COUNT = numbers.Integral

# Every field of a config, with its type. Those of DropIT are checked by DropIT itself.
_FIELDS: dict[str, Any] = {
    "dataset": str,
    "data_dir": str,
    "image_size": _COUNT,
    "batch_size": _COUNT,
    "num_epochs": _COUNT,
    "num_steps": _COUNT,
    "seed": _COUNT,
    "model.name": str,
    "model.width": _COUNT,
    "model.stem": str,
    "model.patch_size": _COUNT,
    "memory": str,
    "remat": str,
    **{f"dropit.{field.name}": object for field in dataclasses.fields(DropIT)},
    "optimizer.learning_rate": _NUMBER,
    "optimizer.momentum": _NUMBER,
    "optimizer.nesterov": bool,
    "optimizer.weight_decay": _NUMBER,
    "schedule.name": str,
    "schedule.warmup_epochs": _NUMBER,
    "schedule.decay_epochs": tuple,
    "schedule.decay_factor": _NUMBER,
}
# How long to train is said in one of two units; of both, the second counts.
_EITHER = ("num_epochs", "num_steps")
# What only some models read.
_OF_MODELS = ("model.width", "model.stem", "model.patch_size")
# What only one kind of schedule reads.
_OPTIONAL = ("schedule.decay_epochs", "schedule.decay_factor")
# JAX makes a PRNG key of what fits into this type.
_LARGEST_SEED = 2**63 - 1

_CHOICES = {
    "dataset": data.DATASETS,
    "model.name": models.MODELS,
    "model.stem": models.STEMS,
    "memory": PRESETS,
    "remat": REMATS,
    "schedule.name": ("cosine", "step"),
}
_POSITIVE = (
    "image_size",
    "batch_size",
    "num_epochs",
    "num_steps",
    "model.width",
    "model.patch_size",
    "optimizer.learning_rate",
    "schedule.decay_factor",
)
_NOT_NEGATIVE = (
    "seed",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "schedule.warmup_epochs",
)


class ConfigError(ValueError):
    """A config that cannot be run, and why."""


# The value of a field of `config.dropit` that is left to `config.memory`.
_OF_PRESET = "preset"


def dropit_section(**fields: Any) -> ConfigDict:
    """The `dropit` section: the fields of the policy in which it is not the preset's.

    Those that are not given have the value "preset". Each may be overridden on the
    command line, with `None` as well (`--config.dropit.chunk_size=None`).

    Raises:
      TypeError: there is no such field.
    """
    names = [field.name for field in dataclasses.fields(DropIT)]
    for name in fields:
        if name not in names:
            raise TypeError(
                f"config.dropit has no field {name!r}, but {', '.join(names)}."
            )
    values = dict.fromkeys(names, _OF_PRESET) | fields
    return ConfigDict(
        {name: FieldReference(value, object) for name, value in values.items()}
    )


def memory(config: ConfigDict) -> Preset:
    """What the model caches, as the config describes it.

    Raises:
      ConfigError: there is no such policy.
    """
    changed = {k: v for k, v in config.dropit.items() if v != _OF_PRESET}
    try:
        return preset(config.memory, remat=config.remat, **changed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.dropit: {error}") from error


def plain(config: ConfigDict) -> ConfigDict:
    """The config with plain Flax layers, and nothing recomputed."""
    variant = copy.deepcopy(config)
    variant.memory, variant.remat = "baseline", "none"
    variant.dropit = dropit_section()
    return variant


def validate(config: ConfigDict, num_devices: int = 1) -> None:
    """Checks a config before anything is done with it.

    Args:
      config: the config.
      num_devices: how many devices share a batch.

    Raises:
      ConfigError: a field is unknown, missing, of the wrong type or out of range. The
        message names it, and says what it may be.
    """
    values = _flat(config)
    _check_names(values)
    for name, value in values.items():
        if not (name in _EITHER and value is None):
            _check_value(name, value)
    _check_model(values)
    _check_decay(values)
    memory(config)
    if values["batch_size"] % num_devices:
        raise ConfigError(
            f"config.batch_size={values['batch_size']} cannot be split evenly over "
            f"{num_devices} devices: make it a multiple of {num_devices}."
        )
    examples = data.info(values["dataset"]).train_examples
    if values["batch_size"] > examples:
        raise ConfigError(
            f"config.batch_size={values['batch_size']} is more than the {examples} "
            f"training examples of {values['dataset']!r}."
        )


def steps(config: ConfigDict) -> tuple[int, int]:
    """Steps in an epoch, and in the whole run."""
    examples = data.info(config.dataset).train_examples
    steps_per_epoch = examples // config.batch_size
    if config.get("num_steps") is not None:
        return steps_per_epoch, config.num_steps
    return steps_per_epoch, config.num_epochs * steps_per_epoch


def to_json(config: ConfigDict) -> str:
    """The config with all its fields resolved."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def differences(old: str, new: str) -> list[str]:
    """The fields that differ between two configs in JSON, a line each."""
    before, after = (_flat(json.loads(text)) for text in (old, new))
    pairs = {
        name: (before.get(name, "absent"), after.get(name, "absent"))
        for name in sorted(before | after)
    }
    return [
        f"config.{name}: {a!r} -> {b!r}" for name, (a, b) in pairs.items() if a != b
    ]


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, ConfigDict | dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


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
