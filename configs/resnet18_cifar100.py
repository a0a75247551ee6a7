"""ResNet-18 on CIFAR-100, as in the paper (§4.1, after Zhang et al., 2019)."""

from ml_collections import ConfigDict

from train.config import variants
from train.config.config import dropit_section, model_section
from train.config.defaults import get_defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = get_defaults()
    config.dataset = "cifar100"
    config.image_size = 32
    config.augmentation = "shift_flip"  # padded by 4, cropped, flipped
    config.batch_size = 128  # §4.1
    config.num_epochs = 200  # §4.1
    config.seed = 42  # §4.1

    config.model = model_section("resnet18", width=64, stem="cifar")
    config.memory = "dropit"  # or "baseline", "exact", "lean", "leanest"
    config.dropit = dropit_section()  # other fields than the preset's: rate=0.9

    # Not in the paper; Zagoruyko and Komodakis, 2016, §3, whose epochs and steps of the
    # learning rate these are. The decay is of kernels alone, theirs of all parameters.
    config.optimizer.learning_rate = 0.1
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "step"
    config.schedule.decay_epochs = (60, 120, 160)  # §4.1
    config.schedule.decay_factor = 1 / 5  # §4.1
    return variants.apply(config, variant, paper_rate=0.8)
