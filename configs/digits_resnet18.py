"""ResNet-18 on scikit-learn's handwritten digits: minutes on a CPU, no download.

The images are scaled to CIFAR's 32x32, for which the model's stem is made.
"""

from ml_collections import ConfigDict

from train.config import variants
from train.config.config import dropit_section, model_section
from train.config.defaults import get_defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = get_defaults()
    config.dataset = "digits"
    config.image_size = 32
    config.batch_size = 64
    config.num_epochs = 10
    config.seed = 42  # as in the paper, §4.1

    config.model = model_section("resnet18", width=16, stem="cifar")
    config.memory = "dropit"  # or "baseline", "exact", "lean", "leanest"
    config.dropit = dropit_section()  # other fields than the preset's: rate=0.9

    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4
    config.schedule.warmup_epochs = 1.0
    return variants.apply(config, variant, paper_rate=0.8)
