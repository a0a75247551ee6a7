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
# What does not change the result of a run, and may change when it is resumed.
_FREE = ("data_dir", "workers", "checkpoint_steps", "profile_steps")
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
    "memory": PRESETS,
    "remat": REMATS,
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


def model_section(name: str, **fields: Any) -> ConfigDict:
    """The `model` section: all that a config says of a model.

    Fields that are not given have the value that is the model's own.

    Raises:
      ValueError: there is no such model.
      TypeError: it has no such field.
    """
    values = models.defaults(name)
    for field in fields:
        if field not in values:
            raise TypeError(
                f"config.model of {name!r} has no field {field!r}, but "
                f"{', '.join(values)}."
            )
    return ConfigDict({"name": name} | values | fields)


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
    _check_profile(values["profile_steps"])
    memory(config)
    _check_mesh(values, num_devices)
    _check_batch(values, num_devices)


def steps(config: ConfigDict) -> tuple[int, int]:
    """Steps in an epoch, and in the whole run."""
    examples = data.info(config.dataset, config.data_dir).train_examples
    steps_per_epoch = examples // config.batch_size
    if config.get("num_steps") is not None:
        return steps_per_epoch, config.num_steps
    return steps_per_epoch, config.num_epochs * steps_per_epoch


def to_json(config: ConfigDict) -> str:
    """The config with all its fields resolved."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote.

    Raises:
      ConfigError: the text is no JSON object, or one that no config can be.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"It is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError("It is no JSON object.")
    try:
        return ConfigDict(_with_tuples(content))
    except ValueError as error:  # of names that no field can have
        raise ConfigError(f"It is no config: {error}") from error


def differences(old: str, new: str) -> list[str]:
    """The fields that differ between two configs in JSON, a line each.

    Those that change nothing in the result of a run are left out.
    """
    before, after = (_flat(json.loads(text)) for text in (old, new))
    pairs = {
        name: (before.get(name, "absent"), after.get(name, "absent"))
        for name in sorted(before | after)
        if name not in _FREE
    }
    return [
        f"config.{name}: {a!r} -> {b!r}" for name, (a, b) in pairs.items() if a != b
    ]


def _with_tuples(value: Any) -> Any:
    """JSON has lists alone; a config, which does not change, has tuples."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


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
        mesh_shape(data_axis, fsdp_axis, num_devices)
    except ValueError as error:
        raise ConfigError(
            f"config.mesh: {data_axis} x {fsdp_axis} devices are not the {num_devices} "
            "that there are. Set config.mesh.data=-1 for all that are left."
        ) from error


def mesh_shape(data_axis: int, fsdp_axis: int, num_devices: int) -> tuple[int, int]:
    """The sizes of the mesh's axes, where -1 is all devices that are left.

    Of two that are -1, the first takes all.

    Raises:
      ValueError: they do not take all devices.
    """
    shape = data_axis, fsdp_axis
    if all(size == -1 or size > 0 for size in shape):
        if data_axis == -1:
            data_axis = num_devices // abs(fsdp_axis)
        if fsdp_axis == -1:
            fsdp_axis = num_devices // data_axis
        if data_axis * fsdp_axis == num_devices:
            return data_axis, fsdp_axis
    raise ValueError(f"{shape[0]} x {shape[1]} is not {num_devices}.")


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
