"""Defines the flags that several commands read, for each command on request."""

import functools
from pathlib import Path

from absl import flags

from train.config.config import ConfigError
from train.system.paths import user_path


@functools.cache  # a flag can be defined once in a process
def data_dir() -> flags.FlagHolder[str]:
    """Defines `--data_dir`, for commands that read prepared datasets."""
    return flags.DEFINE_string(
        "data_dir", "", "Where datasets are; TFDS's default directory if empty."
    )


@functools.cache
def target() -> flags.FlagHolder[str]:
    """Defines `--target`, for commands that compile for a GPU."""
    return flags.DEFINE_string(
        "target",
        "h100",
        "The GPU that is compiled for: a name that the library knows, or the path of a "
        "description.",
    )


@functools.cache
def output() -> flags.FlagHolder[str | None]:
    """Defines `--output`, for commands that write to a given path."""
    return flags.DEFINE_string("output", None, "The directory, or the file, to write.")


def output_path(default: Path | None = None) -> Path:
    """Returns the path in `--output`; without the flag, the default.

    Raises:
      ConfigError: the flag is empty, or missing without a default.
      PathError: the flag's value cannot be a path.
    """
    value = output().value
    if value is None and default is not None:
        return default
    if not value:
        raise ConfigError("--output= is missing: name what to write.")
    return user_path(value)
