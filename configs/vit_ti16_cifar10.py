"""ViT-Ti/16 on CIFAR-10, from scratch: small enough for a laptop's GPU.

Images are scaled to 128x128, which gives 64 patches of 16x16.
"""

from ml_collections import ConfigDict

from train.config import variants
from train.config.config import dropit_section, model_section
from train.config.defaults import get_defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = get_defaults()
    config.dataset = "cifar10"
    config.image_size = 128
    config.augmentation = "shift_flip"
    config.workers = 2  # processes that scale images
    config.batch_size = 128
    config.num_epochs = 50
    config.seed = 42  # as in the paper, §4.1

    config.model = model_section(
        "vit_ti", patch_size=16, pool="gap", positions="sincos", drop_path=0.1
    )
    config.memory = "dropit"  # or "baseline", "exact", "lean", "leanest"
    config.dropit = dropit_section()  # other fields than the preset's: rate=0.9

    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 1.0
    config.schedule.warmup_epochs = 5.0
    config.label_smoothing = 0.1
    return variants.apply(config, variant, paper_rate=0.9)
