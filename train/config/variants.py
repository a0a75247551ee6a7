"""Variants of a config: `--config=configs/FILE.py:paper`."""

from ml_collections import ConfigDict

# Elements of a chunk (DropIT paper, §4.1).
_PAPER_CHUNK = 2**14


def apply(config: ConfigDict, variant: str, *, paper_rate: float) -> ConfigDict:
    """Returns the config, after changing it to a variant.

    Args:
      config: the config, changed in place.
      variant: "", the unchanged config; or "paper": DropIT layers with exact top-k in
        chunks of 2**14 elements and kept values in the activation's dtype, as in the
        paper's experiments.
      paper_rate: the dropping rate of "paper".

    Raises:
      ValueError: the variant is unknown.
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
