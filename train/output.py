"""The flag of the commands that write where they are told to."""

from pathlib import Path

from absl import flags

from train.config.config import ConfigError
from train.system.paths import named

_OUTPUT = flags.DEFINE_string("output", None, "The directory, or the file, to write.")


def output_path(default: Path | None = None) -> Path:
    """What `--output` names, or the default where the flag is left out.

    Raises:
      ConfigError: it names nothing, and there is no default.
      PathError: it is no name.
    """
    if _OUTPUT.value is None and default is not None:
        return default
    if not _OUTPUT.value:
        raise ConfigError("--output= is missing: name what to write.")
    return named(_OUTPUT.value)
