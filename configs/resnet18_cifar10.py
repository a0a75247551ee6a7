"""ResNet-18 on CIFAR-10: small enough for a laptop's GPU.

`--config.model.width=16` makes it small enough for a CPU.
"""

from ml_collections import ConfigDict

from train.config import variants
from train.config.config import dropit_section, model_section
from train.config.defaults import get_defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = get_defaults()
    config.dataset = "cifar10"
    config.image_size = 32
    config.augmentation = "shift_flip"  # padded by 4, cropped, flipped
    config.batch_size = 128
    config.num_epochs = 30
    config.seed = 42  # as in the paper, §4.1

    config.model = model_section("resnet18", width=64, stem="cifar")
    config.memory = "dropit"  # or "baseline", "exact", "lean", "leanest"
    config.dropit = dropit_section()  # other fields than the preset's: rate=0.9

    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 0.2
    return variants.apply(config, variant, paper_rate=0.8)
