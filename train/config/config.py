"""Reads the sections of a config, and converts configs to and from JSON."""

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
    """A config cannot be run; the message has the reason."""


# A field of `config.dropit` with this value is as in the preset "dropit".
_OF_PRESET = "preset"


def dropit_section(**fields: Any) -> ConfigDict:
    """Returns the `dropit` section: the fields of the policy.

    A field that is not given has the value "preset": it is as in the preset "dropit".
    Each field may be overridden on the command line, also with `None`
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
    """Returns the `model` section: the name and the fields of the model.

    A field that is not given has the default of the model.

    Raises:
      ValueError: the model is unknown.
      TypeError: the model has no such field.
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
      ConfigError: `config.dropit` is no policy.
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
    """Returns the preset for `drop` of the loss; `None` for the plain loss.

    Raises:
      ConfigError: `config.dropit` is no policy.
    """
    if config.memory == BASELINE:
        return None
    if config.memory != "dropit":
        return dropit_jax.preset(config.memory)
    return dropit_jax.preset("dropit", kernel=policy(config))


def model_layers(config: ConfigDict) -> Layers:
    """Returns the layers of which the model is built.

    Raises:
      ConfigError: `config.dropit` is no policy.
    """
    return layers.FLAX if config.layers == "flax" else layers.dropit(policy(config))


def uses_policy(config: ConfigDict) -> bool:
    """Returns whether the run uses the policy in `config.dropit`."""
    return "dropit" in (config.memory, config.layers)


def plain(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config with plain Flax, nothing dropped or recomputed."""
    variant = copy.deepcopy(config)
    variant.memory, variant.layers, variant.remat = BASELINE, "flax", "none"
    variant.dropit = dropit_section()
    return variant


def without_unused_epochs(config: ConfigDict) -> ConfigDict:
    """Returns the config without `num_epochs` if it has `num_steps` too.

    `num_steps` then decides, and configs of equal runs are equal.
    """
    if config.get("num_steps") is None or config.get("num_epochs") is None:
        return config
    config = copy.deepcopy(config)
    config.num_epochs = None
    return config


def steps(config: ConfigDict) -> tuple[int, int]:
    """Returns the numbers of steps in an epoch and in the whole run.

    For 50,000 examples, batches of 128 and 10 epochs: `(390, 3900)`. If
    `config.num_steps` is set, it is the second number.

    Raises:
      DataError: as `data.info`.
    """
    examples = data.info(config.dataset, config.data_dir).train_examples
    steps_per_epoch = examples // config.batch_size
    if config.get("num_steps") is not None:
        return steps_per_epoch, config.num_steps
    return steps_per_epoch, config.num_epochs * steps_per_epoch


def to_json(config: ConfigDict) -> str:
    """Returns the config in JSON, with the values of all fields."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the config of a text that `to_json` returned.

    Raises:
      ConfigError: the text is no JSON object, or the object is no config.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"Not JSON: {shorten(error)}.") from error
    if not isinstance(content, dict):
        raise ConfigError("Not a JSON object.")
    try:
        return ConfigDict(_migrated(_with_tuples(content)))
    except Exception as error:  # of many types, for names that no field can have
        raise ConfigError(f"Not a config: {shorten(error)}") from error


def _migrated(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config; renames the fields of configs of early runs.

    In an early config `memory` selected the layers, and the field `drop` was the preset
    of the loss. The layers "lean" are gone: their parameters fit the layers of Flax.
    Without DropIT layers the fields of the policy become "preset".
    """
    if "layers" in fields or "memory" not in fields:
        return fields
    others = {name: value for name, value in fields.items() if name != "drop"}
    layers = "dropit" if fields["memory"] == "dropit" else "flax"
    if layers == "flax" and "dropit" in fields:
        others["dropit"] = dict.fromkeys(fields["dropit"], _OF_PRESET)
    return others | {"memory": fields.get("drop") or BASELINE, "layers": layers}


def check_can_go_on(text: str) -> None:
    """Checks that a run with this config in JSON can be trained further.

    Raises:
      ConfigError: the run has the layers "lean" of early versions, which are gone.
    """
    fields = json.loads(text)
    if "layers" not in fields and fields.get("memory") == "lean":
        raise ConfigError(
            "This run was trained with the layers 'lean' of an early version, which "
            "are gone: it can be evaluated and exported, and not go on. Start another "
            "with --config.memory=lean."
        )


def differences(old: str, new: str) -> list[str]:
    """Returns a line for each field that differs between two configs in JSON.

    For instance ["config.seed: 42 -> 1"]. Fields in `_FREE` are left out.
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
    """Returns a value with its lists as tuples: configs have tuples, JSON has lists."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the fields of nested sections by full name.

    `{"seed": 42, "mesh": {"data": -1}}` -> `{"seed": 42, "mesh.data": -1}`.
    """
    fields: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, ConfigDict | dict):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields
