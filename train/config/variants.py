"""Variants of a config: `--config=configs/FILE.py:paper`."""

from ml_collections import ConfigDict

# Elements in a chunk, of which each device keeps the largest (DropIT paper, §4.1).
_PAPER_CHUNK = 2**14


def apply(config: ConfigDict, variant: str, *, paper_rate: float) -> ConfigDict:
    """Returns the config with the changes of a variant.

    Args:
      config: is changed.
      variant: "", the config as it is; or "paper": DropIT layers, with exact top-k in
        chunks of 2**14 elements whose values are not compressed, as in the paper's
        experiments.
      paper_rate: the rate of "paper".

    Raises:
      ValueError: there is no such variant.
    """
    if variant not in ("", "paper"):
        raise ValueError(f"There is no variant {variant!r}; known is 'paper'.")
    if variant == "paper":
        config.memory, config.layers = "baseline", "dropit"
        config.dropit.update(
            rate=paper_rate,
            chunk_size=_PAPER_CHUNK,
            selection="top_k",
            value_dtype=None,
        )
    return config
