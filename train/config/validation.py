"""Checks that a config has all required fields, with valid values, and no others."""

import dataclasses
import difflib
import math
import os
from collections.abc import Collection
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dropit_jax import PRESETS, DropIT
from train import data, models
from train.config import config as config_lib
from train.config import mesh_axes
from train.config.config import ConfigError
from train.system import text

# Python's types: JSON cannot store NumPy's numbers.
_INTEGRAL, _REAL = int, int | float
_NAMES = {_INTEGRAL: "integral", _REAL: "real"}
# Steps are counted in an int32.
_LARGEST_COUNT = 2**31 - 1
_SMALLEST_FLOAT32 = float(np.finfo(np.float32).tiny)
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
# The most workers for a CPU: some of them wait for a disk.
_WORKERS_PER_CPU = 8


@dataclasses.dataclass(frozen=True)
class _Field:
    """The type and the bounds of a field of a config.

    For `_Field(int | float, least=0, most=1, is_below=True)` the valid values are the
    numbers in [0, 1).

    Attributes:
      type: the type of the value.
      choices: the valid values; empty: all in the bounds.
      least: the lower bound.
      most: the upper bound.
      is_above: whether a value equal to `least` is invalid.
      is_below: whether a value equal to `most` is invalid.
      or_zero: whether 0, which means "none", is valid even below `least`.
    """

    type: Any = object
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    most: float = math.inf
    is_above: bool = False
    is_below: bool = False
    or_zero: bool = False

    def problem(self, value: Any) -> str:
        """Returns the error message for an invalid value; "" for a valid one.

        The message continues the field's name: " must be finite".
        """
        is_number = self.type in (_INTEGRAL, _REAL)
        if not isinstance(value, self.type) or (is_number and isinstance(value, bool)):
            return f" must be of type {_NAMES.get(self.type) or self.type.__name__}"
        if self.choices and value not in self.choices:
            known = ", ".join(map(repr, self.choices))
            return f": unknown value {text.shorten_repr(value)}; known are {known}"
        if not is_number or (self.or_zero and value == 0):
            return ""
        if not -math.inf < value < math.inf:
            return " must be finite"
        return self._outside(value) or self._beyond_float32(value)

    def _outside(self, value: Any) -> str:
        """Returns the error message for a number outside the bounds; else ""."""
        is_low = not self.least < value if self.is_above else value < self.least
        is_high = not value < self.most if self.is_below else value > self.most
        if not (is_low or is_high):
            return ""
        if self.is_below:
            return f" must be in [{self.least:g}, {self.most:g})"
        if is_high:
            return f" must be at most {self.most:,}"
        if self.or_zero:
            return f" must be 0, or at least {self.least:g}"
        if self.least == 0 and not self.is_above:
            return " must not be negative"
        return " must be above 0"

    def _beyond_float32(self, value: Any) -> str:
        """Returns the error message for a number that float32 turns into 0 or infinity.

        Returns "" for 0 itself, for other numbers and for integral fields.
        """
        if self.type is not _REAL or value == 0:
            return ""
        if abs(value) < _SMALLEST_FLOAT32:
            return " must not be 0 in a float32"
        return " must be finite in a float32" if abs(value) > _LARGEST_FLOAT32 else ""


_TEXT = _Field(str)
_FLAG = _Field(bool)
_TUPLE = _Field(tuple)
_NUMBER = _Field(_REAL, least=0)
_POSITIVE = _Field(_REAL, least=0, is_above=True)
_FRACTION = _Field(_REAL, least=0, most=1, is_below=True)


def _choice(*values: str) -> _Field:
    return _Field(str, choices=values)


def _count(least: int, most: int = _LARGEST_COUNT) -> _Field:
    return _Field(_INTEGRAL, least=least, most=most)


# Every field of a config. `DropIT` itself checks the values of its fields.
_FIELDS = {
    "dataset": _choice(*data.DATASETS),
    "data_dir": _TEXT,
    "image_size": _count(1, 2**14),
    "augmentation": _choice(*data.AUGMENTATIONS),
    "normalise": _choice("dataset", "unit"),
    "workers": _count(0),
    "batch_size": _count(1),
    "accumulate_steps": _count(1),
    "num_epochs": _count(1),
    "num_steps": _count(1),
    "seed": _count(0, 2**32 - 1),  # the bits that `jax.random.key` takes
    "model.name": _choice(*models.MODELS),
    "model.width": _count(1, 2**16),
    "model.stem": _choice(*models.STEMS),
    "model.patch_size": _count(1, 2**14),
    "model.pool": _choice(*models.POOLS),
    "model.positions": _choice(*models.POSITIONS),
    "model.dropout": _FRACTION,
    "model.drop_path": _FRACTION,
    "model.scan": _FLAG,
    "init_from": _TEXT,
    "dtype": _choice("float32", "bfloat16"),
    "memory": _choice(config_lib.BASELINE, *PRESETS),
    "layers": _choice(*config_lib.LAYERS),
    "remat": _choice(*models.REMATS),
    **{f"dropit.{field.name}": _Field() for field in dataclasses.fields(DropIT)},
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.momentum": _FRACTION,
    "optimizer.nesterov": _FLAG,
    "optimizer.weight_decay": _NUMBER,
    "optimizer.clip_norm": _NUMBER,
    "schedule.name": _choice("cosine", "step"),
    "schedule.warmup_epochs": dataclasses.replace(_NUMBER, most=_LARGEST_COUNT),
    "schedule.decay_epochs": _TUPLE,
    "schedule.decay_factor": _POSITIVE,
    "label_smoothing": _FRACTION,
    # Outside, all samples of the beta distribution are 0, 1 or 1/2 in float32.
    "mixup": _Field(_REAL, least=1e-6, most=1e6, or_zero=True),
    "ema_decay": _FRACTION,
    "evaluate_every": dataclasses.replace(_POSITIVE, most=_LARGEST_COUNT),
    "checkpoint_steps": _count(0),
    "profile_steps": _TUPLE,
    "mesh.data": _Field(_INTEGRAL),
    "mesh.fsdp": _Field(_INTEGRAL),
}
# The length of a run, in epochs or in steps. With both, the steps decide.
_EITHER = ("num_epochs", "num_steps")
# The fields that only some models have.
_OF_MODELS = tuple(
    f"model.{field}"
    for field in dict.fromkeys(
        field for name in models.MODELS for field in models.fields(name)
    )
)
# The fields that only the schedule "step" needs.
_OPTIONAL = ("schedule.decay_epochs", "schedule.decay_factor")


def validate(config: ConfigDict, num_devices: int | None = 1) -> None:
    """Checks a config, before it is used.

    Args:
      config: the config.
      num_devices: the number of devices that share a batch; `None`: any number that the
        mesh may take.

    Raises:
      ConfigError: a field is unknown, missing, of the wrong type or out of range, or
        contradicts another field. The message has the field's name and the valid
        values.
      DataError: as `data.info`.
    """
    values = config_lib.flat(config)
    _check_names(values)
    for name, value in values.items():
        if not (name in _EITHER and value is None):
            _check_value(name, value)
    _check_model(values)
    _check_decay(values)
    _check_profile(values["profile_steps"])
    _check_policy(config)
    _check_mesh(values, num_devices)
    _check_batch(values, num_devices or 1)


def check_worker_count(config: ConfigDict) -> None:
    """Checks that a config has at most `most_workers`.

    Raises:
      ConfigError: it has more.
    """
    most = most_workers(config)
    if config.workers > most:
        raise ConfigError(
            f"config.workers={config.workers} is more than {most}: {_WORKERS_PER_CPU} "
            f"for each of the {_cpus()} CPUs, and no more than an epoch has batches."
        )


def most_workers(config: ConfigDict) -> int:
    """Returns the largest useful number of workers, by CPUs and by batches an epoch."""
    return min(_WORKERS_PER_CPU * _cpus(), config_lib.steps(config)[0])


def _cpus() -> int:
    return os.cpu_count() or 1


def unknown_field(names: Collection[str], name: str) -> str:
    """Returns the error message for an unknown field: known and similar fields.

    Args:
      names: the full names of all fields, such as "optimizer.momentum".
      name: the unknown name.
    """
    if name == "drop":  # as it was called in early versions
        preset = "config.memory is the preset of dropit_jax.drop"
        return f"config.drop is not a field that a config has: {preset}."
    if any(each.startswith(f"{name}.") for each in names):
        return f"config.{name} is a section of fields: set the fields, not the section."
    section, _, field = name.rpartition(".")
    start = f"{section}." if section else ""
    inside = dict.fromkeys(
        each.removeprefix(start).split(".")[0]
        for each in names
        if each.startswith(start)
    )
    has = f" config{section and '.' + section} has {text.join_names(inside)}."
    near = [start + each for each in difflib.get_close_matches(field, inside)]
    near += difflib.get_close_matches(name, names, cutoff=0.8)
    hint = f" Did you mean config.{near[0]}?" if near else ""
    return (
        f"config.{text.shorten(name)} is not a field that a config has."
        f"{has if inside else ''}{hint}"
    )


def _check_names(values: dict[str, Any]) -> None:
    if any(name.startswith("variants.") for name in values):
        raise ConfigError(
            "This config is a grid of variants: python -m train.ablation trains it."
        )
    for name in values:
        if name not in _FIELDS:
            raise ConfigError(unknown_field(_FIELDS, name))
    if all(values.get(name) is None for name in _EITHER):
        raise ConfigError("Set config.num_epochs or config.num_steps.")
    for name in _FIELDS:
        if name not in (*values, *_EITHER, *_OPTIONAL, *_OF_MODELS):
            raise ConfigError(f"config.{name} is missing.")


def _check_value(name: str, value: Any) -> None:
    problem = _FIELDS[name].problem(value)
    if problem:
        got = "" if problem.startswith(":") else f", got {text.shorten_repr(value)}"
        raise ConfigError(f"config.{name}{problem}{got}.")


def _check_model(values: dict[str, Any]) -> None:
    """Checks that a model has the fields that it reads, and no others.

    Also checks that its patches divide the image evenly.
    """
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
    """Checks that the schedule "step", and no other, has `schedule.decay_epochs`."""
    epochs = values.get("schedule.decay_epochs", ())
    if not all(
        isinstance(epoch, int | float)
        and not isinstance(epoch, bool)
        and 0 <= epoch <= _LARGEST_COUNT
        for epoch in epochs
    ):
        raise ConfigError(
            "config.schedule.decay_epochs takes numbers of epochs, got "
            f"{text.shorten_repr(epochs)}."
        )
    if values["schedule.name"] != "step":
        if epochs:
            raise ConfigError(
                "config.schedule.decay_epochs is for config.schedule.name='step', got "
                f"{text.shorten_repr(epochs)} beside {values['schedule.name']!r}."
            )
        return
    for name in _OPTIONAL:
        if not values.get(name):
            raise ConfigError(f"config.{name} is missing: the step schedule needs it.")


def _check_profile(steps: tuple[Any, ...]) -> None:
    """Checks `profile_steps`: empty, or the first traced step and the last plus 1."""
    if not steps:
        return
    if not (
        len(steps) == 2
        and all(type(step) is int for step in steps)  # not a bool
        and 0 <= steps[0] < steps[1] <= _LARGEST_COUNT
    ):
        raise ConfigError(
            "config.profile_steps takes the first step and the one after the last, "
            f"such as (10, 13), got {text.shorten_repr(steps)}."
        )


def _check_policy(config: ConfigDict) -> None:
    """Checks the policy; each field of an unused policy must be "preset"."""
    config_lib.policy(config)
    if config_lib.uses_policy(config):
        return
    unused = config_lib.dropit_section()
    for name, value in config.dropit.items():
        if value != unused[name]:
            raise ConfigError(
                f"config.dropit.{name} is for config.memory='dropit' or "
                f"config.layers='dropit', got {text.shorten_repr(value)} beside "
                f"{config.memory!r} and {config.layers!r}."
            )


def _check_mesh(values: dict[str, Any], num_devices: int | None) -> None:
    """Checks that the axes of the mesh take all devices."""
    data_axis, fsdp_axis = values["mesh.data"], values["mesh.fsdp"]
    for name, size in (("data", data_axis), ("fsdp", fsdp_axis)):
        if size != -1 and size < 1:
            raise ConfigError(
                f"config.mesh.{name} must be above 0, or -1 for all devices that are "
                f"left, got {text.shorten_repr(size)}."
            )
    if num_devices is None:
        return
    try:
        mesh_axes.sizes(data_axis, fsdp_axis, num_devices)
    except ValueError as error:
        raise ConfigError(
            f"config.mesh: {text.shorten(data_axis)} x {text.shorten(fsdp_axis)} "
            f"devices are asked for, and there are {num_devices}. Set "
            "config.mesh.data=-1 to use all of them."
        ) from error


def _check_batch(values: dict[str, Any], num_devices: int) -> None:
    """Checks that a batch can be split evenly, and is no larger than the dataset.

    Also checks that the steps of all epochs can be counted in an int32.
    """
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
    steps = (values.get("num_epochs") or 0) * (examples // size)
    if values.get("num_steps") is None and steps > _LARGEST_COUNT:
        raise ConfigError(
            f"config.num_epochs={values['num_epochs']} takes {steps:,} steps; the most "
            f"is {_LARGEST_COUNT:,}."
        )
