"""Configs that differ from those of `configs/` by some fields."""

from ml_collections import ConfigDict

from train.config import validation
from train.config.config import ConfigError


def put(config, name, value):
    """Gives a field, "section.field", a value of any type."""
    *sections, field = name.split(".")
    with config.unlocked(), config.ignore_type():
        section = config
        for part in sections:
            section = section[part]
        if field in section:
            del section[field]  # which has a type, to which it would be converted
        section[field] = value


def delete(config, name):
    """Takes a field, "section.field", away."""
    *sections, field = name.split(".")
    section = config
    for part in sections:
        section = section[part]
    del section[field]


def changed(get_config, **values):
    """A shipped config with other values; `__` stands for the dot."""
    config = get_config()
    for name, value in values.items():
        put(config, name.replace("__", "."), value)
    return config


def names(section, prefix=""):
    """The names of all fields."""
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            yield from names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def refusal(config, num_devices=1):
    """Why `validate` refuses a config; `None`: it does not."""
    try:
        validation.validate(config, num_devices)
    except ConfigError as error:
        return str(error)
    return None
