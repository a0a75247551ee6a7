"""The flag of the commands that read prepared datasets."""

from absl import flags

DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Where datasets are; TFDS's default directory if empty."
)
