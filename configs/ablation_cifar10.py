"""The paper's Table 2, and what is ours, on CIFAR-10 at a size that a CPU trains.

ResNet-18 of width 8 instead of 64 sees 3.2 times 50,000 images instead of 200 times.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import resnet18_cifar10
from train.config.config import dropit_section

_SEEDS = (42, 1, 2)
_PAPER_CHUNK = 2**14


def get_config() -> ConfigDict:
    """The config of every run, the runs, and their seeds."""
    base = resnet18_cifar10.get_config()
    base.model.width = 8
    base.num_epochs = None
    base.num_steps = 1250
    base.evaluate_every = 0.64  # epochs: five times in a run

    config = ConfigDict()
    config.base = base
    config.variants = ConfigDict(_variants())
    return config


def _variants() -> dict[str, ConfigDict]:
    """Returns each variant's fields; all other fields are those of `base`."""
    variants = {"baseline": _variant("baseline", _SEEDS)}
    for rate in (0.5, 0.8, 0.9, 0.99):
        for chunk_size in (16, _PAPER_CHUNK):
            variants[f"min_k_{rate:.0%}_d{chunk_size}".replace("%", "")] = _layers(
                _SEEDS if rate == 0.8 else _SEEDS[:1],
                rate=rate,
                chunk_size=chunk_size,
                value_dtype=None,
            )
    return variants | {
        "random_80": _layers(strategy="random", rate=0.8, value_dtype=None),
        "channels_80": _layers(granularity="channel", rate=0.8, value_dtype=None),
        "default": _layers(_SEEDS),
        "min_k_50_int4": _layers(_SEEDS, rate=0.5, value_dtype="int4"),
        "min_k_75_int4_mean": _layers(rate=0.75, value_dtype="int4", fill="mean"),
        "plain_int4": _layers(_SEEDS, rate=0.0, value_dtype="int4"),
        "plain_int2": _layers(rate=0.0, value_dtype="int2"),
        "dropit": _variant("dropit", _SEEDS),
        "lean": _variant("lean", _SEEDS),
    }


def _variant(memory: str, seeds: tuple[int, ...]) -> ConfigDict:
    """Returns plain Flax layers, the loss dropped with a preset."""
    return ConfigDict({"memory": memory, "dropit": dropit_section(), "seeds": seeds})


def _layers(seeds: tuple[int, ...] = _SEEDS[:1], **policy: Any) -> ConfigDict:
    """Returns DropIT layers with a policy."""
    return ConfigDict(
        {
            "memory": "baseline",
            "layers": "dropit",
            "dropit": dropit_section(**policy),
            "seeds": seeds,
        }
    )
