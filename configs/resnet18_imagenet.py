"""ResNet-18 on ImageNet, as in the paper (§4.1)."""

from ml_collections import ConfigDict

from train.config import variants
from train.config.config import dropit_section, model_section
from train.config.defaults import get_defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = get_defaults()
    config.dataset = "imagenet2012"
    config.image_size = 224
    config.augmentation = "resized_crop"
    config.workers = 8  # processes that decode JPEG files
    config.batch_size = 256  # §4.1
    config.num_epochs = 90  # §4.1
    config.seed = 42  # §4.1

    config.model = model_section("resnet18", width=64, stem="imagenet")
    config.memory = "dropit"  # or "baseline", "exact", "lean", "leanest"
    config.dropit = dropit_section()  # other fields than the preset's: rate=0.9

    config.optimizer.learning_rate = 0.1  # §4.1
    # Not in the paper; He et al., 2016, §3.4. Here of kernels alone.
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "step"
    config.schedule.decay_epochs = (30, 60)  # §4.1
    config.schedule.decay_factor = 1 / 10  # §4.1
    config.checkpoint_steps = 1000
    return variants.apply(config, variant, paper_rate=0.8)
