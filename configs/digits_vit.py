"""A small vision transformer on scikit-learn's handwritten digits: a minute on a CPU.

It reads the 8x8 images as 16 patches of 2x2.
"""

from ml_collections import ConfigDict

from train.config import variants
from train.config.config import dropit_section, model_section
from train.config.defaults import get_defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = get_defaults()
    config.dataset = "digits"
    config.image_size = 8
    config.batch_size = 64
    config.num_epochs = 60
    config.seed = 42  # as in the paper, §4.1

    config.model = model_section("vit_mu", patch_size=2, pool="gap")
    config.memory = "dropit"  # or "baseline", "exact", "lean", "leanest"
    config.dropit = dropit_section()  # other fields than the preset's: rate=0.9

    config.optimizer.learning_rate = 0.2
    config.optimizer.clip_norm = 1.0
    config.schedule.warmup_epochs = 2.0
    config.label_smoothing = 0.1
    return variants.apply(config, variant, paper_rate=0.9)
