"""What a config may say, and the check that it says that and nothing else."""

import dataclasses
import difflib
import json
import math
import numbers
from typing import Any

from ml_collections import ConfigDict, FieldReference

from dropit_jax import DropIT
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
    "dropit.enabled": bool,
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
# What only one kind of schedule reads.
_OPTIONAL = ("schedule.decay_epochs", "schedule.decay_factor")
# JAX makes a PRNG key of what fits into this type.
_LARGEST_SEED = 2**63 - 1

_CHOICES = {
    "dataset": data.DATASETS,
    "model.name": models.MODELS,
    "model.stem": models.STEMS,
    "schedule.name": ("cosine", "step"),
}
_POSITIVE = (
    "image_size",
    "batch_size",
    "num_epochs",
    "num_steps",
    "model.width",
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


def dropit_section(*, enabled: bool = True, **fields: Any) -> ConfigDict:
    """The `dropit` section: whether DropIT is on, and every field of its policy.

    Fields that are not given have the policy's default. Each may be overridden on the
    command line, with `None` as well (`--config.dropit.chunk_size=None`).
    """
    policy = dataclasses.asdict(DropIT(**fields))
    return ConfigDict(
        {"enabled": enabled}
        | {name: FieldReference(value, object) for name, value in policy.items()}
    )


def dropit_policy(config: ConfigDict) -> DropIT | None:
    """The policy that the config describes; `None` where DropIT is off.

    Raises:
      ConfigError: there is no such policy.
    """
    fields = dict(config.dropit)
    enabled = fields.pop("enabled")
    try:
        policy = DropIT(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.dropit: {error}") from error
    return policy if enabled else None


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
    _check_decay(values)
    dropit_policy(config)
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
        if name not in (*values, *_EITHER, *_OPTIONAL):
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
