"""What a config says: its sections, what they mean, and its text."""

import copy
import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict, FieldReference

from dropit_jax import DropIT, LayerPreset, layer_preset
from train import data, models
from train.system.text import literal, shown

# What changes the result of a run by no more than rounding, and may change when it is
# resumed: on other devices, for one, where the state is sharded anew.
_FREE = (
    "checkpoint_steps",
    "data_dir",
    "mesh.data",
    "mesh.fsdp",
    "profile_steps",
    "workers",
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


def memory(config: ConfigDict) -> LayerPreset:
    """What the model caches, as the config describes it.

    Raises:
      ConfigError: there is no such policy.
    """
    changed = {
        name: value
        for name, value in config.dropit.items()
        if not (isinstance(value, str) and value == _OF_PRESET)
    }
    try:
        return layer_preset(config.memory, remat=config.remat, **changed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.dropit: {error}") from error


def plain(config: ConfigDict) -> ConfigDict:
    """The config with plain Flax layers, nothing recomputed, and nothing dropped."""
    variant = copy.deepcopy(config)
    variant.memory, variant.remat, variant.drop = "baseline", "none", ""
    variant.dropit = dropit_section()
    return variant


def without_unused_epochs(config: ConfigDict) -> ConfigDict:
    """The config without `num_epochs` where `num_steps` says how long to train.

    Or two runs would differ by what does not matter.
    """
    if config.get("num_steps") is None or config.get("num_epochs") is None:
        return config
    config = copy.deepcopy(config)
    config.num_epochs = None
    return config


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
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"It is no JSON: {shown(error)}.") from error
    if not isinstance(content, dict):
        raise ConfigError("It is no JSON object.")
    try:
        return ConfigDict(_with_tuples(content))
    except Exception as error:  # of many types: of names that no field can have
        raise ConfigError(f"It is no config: {shown(error)}") from error


def differences(old: str, new: str) -> list[str]:
    """The fields that differ between two configs in JSON, a line each.

    Those that change nothing in the result of a run are left out.
    """
    before, after = (flat(json.loads(text)) for text in (old, new))
    pairs = {
        name: (before.get(name, "absent"), after.get(name, "absent"))
        for name in sorted(before | after)
        if name not in _FREE
    }
    return [
        f"config.{shown(name)}: {literal(a)} -> {literal(b)}"
        for name, (a, b) in pairs.items()
        if a != b
    ]


def _with_tuples(value: Any) -> Any:
    """JSON has lists alone; a config, which does not change, has tuples."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every field of a config, or of a dict like one, as "section.field"."""
    fields: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, ConfigDict | dict):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields
