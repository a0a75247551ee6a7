"""Training under `dropit_jax.drop`: the plain loss and each preset, three seeds.

`--config=configs/ablation_drop.py:digits_vit` trains the small vision transformer on
digits, `:digits_resnet18` the ResNet, and `:cifar10` a ResNet-18 of width 8 on a part
of CIFAR-10: 300 steps of 128 images.
"""

from ml_collections import ConfigDict

from configs import digits_resnet18, digits_vit, resnet18_cifar10
from train.config.config import dropit_section

_PRESETS = ("baseline", "exact", "lean", "leanest")
_SEEDS = (42, 1, 2)


def get_config(model: str = "digits_vit") -> ConfigDict:
    """The config of every run, the runs, and their seeds.

    Raises:
      ValueError: there is no such model.
    """
    base = _base(model)
    config = ConfigDict()
    config.base = base
    config.variants = ConfigDict(
        {
            preset: {"memory": preset, "dropit": dropit_section(), "seeds": _SEEDS}
            for preset in _PRESETS
        }
    )
    return config


def _base(model: str) -> ConfigDict:
    if model == "digits_vit":
        return digits_vit.get_config()
    if model == "digits_resnet18":
        return digits_resnet18.get_config()
    if model != "cifar10":
        known = "'digits_vit', 'digits_resnet18', 'cifar10'"
        raise ValueError(f"There is no model {model!r}; known are {known}.")
    base = resnet18_cifar10.get_config()
    base.model.width = 8
    base.num_epochs = None
    base.num_steps = 300
    base.evaluate_every = 0.25  # epochs
    return base
