"""The sections of a config, their meaning, and the config in JSON."""

import copy
import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict, FieldReference

import dropit_jax
from dropit_jax import DropIT, Preset
from train import data, models
from train.models import layers
from train.models.layers import Layers
from train.system.text import shorten, shorten_repr

# Fields that change the result of a run by rounding at most. They may change when the
# run is resumed, for instance on other devices.
_FREE = (
    "checkpoint_steps",
    "data_dir",
    "mesh.data",
    "mesh.fsdp",
    "profile_steps",
    "workers",
)


# The value of `config.memory` without a preset.
BASELINE = "baseline"
LAYERS = ("flax", "dropit")


class ConfigError(ValueError):
    """A config that cannot be run, and why."""


# The value of a field of `config.dropit` that is that of the preset "dropit".
_OF_PRESET = "preset"


def dropit_section(**fields: Any) -> ConfigDict:
    """Returns the `dropit` section: the fields of the policy.

    Fields that are not given have the value "preset": they are those of the preset
    "dropit". Each may be overridden on the command line, also with `None`
    (`--config.dropit.chunk_size=None`).

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
    """Returns the `model` section.

    Fields that are not given have the model's own values.

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


def policy(config: ConfigDict) -> DropIT:
    """Returns the policy of the preset "dropit" and of the DropIT layers.

    Raises:
      ConfigError: there is no such policy.
    """
    changed = {
        name: value
        for name, value in config.dropit.items()
        if not (isinstance(value, str) and value == _OF_PRESET)
    }
    kernel: Any = dropit_jax.preset("dropit").kernel
    try:
        return dataclasses.replace(kernel.policy, **changed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.dropit: {error}") from error


def preset(config: ConfigDict) -> Preset | None:
    """Returns the preset that the loss is dropped with; `None`: the plain loss.

    Raises:
      ConfigError: there is no such policy.
    """
    if config.memory == BASELINE:
        return None
    if config.memory != "dropit":
        return dropit_jax.preset(config.memory)
    return dropit_jax.preset("dropit", kernel=policy(config))


def model_layers(config: ConfigDict) -> Layers:
    """Returns the layers that the model is built of.

    Raises:
      ConfigError: there is no such policy.
    """
    return layers.FLAX if config.layers == "flax" else layers.dropit(policy(config))


def uses_policy(config: ConfigDict) -> bool:
    """Returns whether `config.dropit` says anything about the run."""
    return "dropit" in (config.memory, config.layers)


def plain(config: ConfigDict) -> ConfigDict:
    """Returns the config with plain Flax: nothing dropped, nothing recomputed."""
    variant = copy.deepcopy(config)
    variant.memory, variant.layers, variant.remat = BASELINE, "flax", "none"
    variant.dropit = dropit_section()
    return variant


def without_unused_epochs(config: ConfigDict) -> ConfigDict:
    """Returns the config without `num_epochs` if it has `num_steps`, which counts.

    Runs that differ in `num_epochs` alone are the same then.
    """
    if config.get("num_steps") is None or config.get("num_epochs") is None:
        return config
    config = copy.deepcopy(config)
    config.num_epochs = None
    return config


def steps(config: ConfigDict) -> tuple[int, int]:
    """Returns the numbers of steps in an epoch and in the whole run."""
    examples = data.info(config.dataset, config.data_dir).train_examples
    steps_per_epoch = examples // config.batch_size
    if config.get("num_steps") is not None:
        return steps_per_epoch, config.num_steps
    return steps_per_epoch, config.num_epochs * steps_per_epoch


def to_json(config: ConfigDict) -> str:
    """Returns the config in JSON, all its fields resolved."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the config that `to_json` wrote.

    Raises:
      ConfigError: the text is no JSON object, or one that no config can be.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"It is no JSON: {shorten(error)}.") from error
    if not isinstance(content, dict):
        raise ConfigError("It is no JSON object.")
    try:
        return ConfigDict(_migrated(_with_tuples(content)))
    except Exception as error:  # of many types: of names that no field can have
        raise ConfigError(f"It is no config: {shorten(error)}") from error


def _migrated(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config; those of early runs with their names of today.

    There `memory` was about layers, where "lean" stored in 8 bits without `drop`, and
    `drop` was the preset around the loss.
    """
    if "layers" in fields or "memory" not in fields:
        return fields
    memory, preset = fields["memory"], fields.get("drop", "")
    layers = "dropit" if memory == "dropit" else "flax"
    memory = preset or ("lean" if memory == "lean" else BASELINE)
    others = {name: value for name, value in fields.items() if name != "drop"}
    return others | {"memory": memory, "layers": layers}


def differences(old: str, new: str) -> list[str]:
    """Returns a line for each field that differs between two configs in JSON.

    Fields that do not change the result of a run are left out.
    """
    before, after = (flat(json.loads(text)) for text in (old, new))
    pairs = {
        name: (before.get(name, "absent"), after.get(name, "absent"))
        for name in sorted(before | after)
        if name not in _FREE
    }
    return [
        f"config.{shorten(name)}: {shorten_repr(a)} -> {shorten_repr(b)}"
        for name, (a, b) in pairs.items()
        if a != b
    ]


def _with_tuples(value: Any) -> Any:
    """Returns the value with tuples for lists: JSON has no tuples, configs no lists."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every field of a config, or of a dict like one, as "section.field"."""
    fields: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, ConfigDict | dict):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields
