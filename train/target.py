"""The flag of the commands that compile for a GPU."""

from absl import flags

TARGET = flags.DEFINE_string(
    "target",
    "h100",
    "The GPU that is compiled for: a name that the library knows, or the path of a "
    "description.",
)
