"""ViT-B/16, pretrained on ImageNet-21k, on ImageNet, as in the paper (§4.1).

`config.init_from` names Google's checkpoint: README.md of
github.com/google-research/vision_transformer says where it is.
"""

from ml_collections import ConfigDict

from train.config import variants
from train.config.config import dropit_section, model_section
from train.config.defaults import get_defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = get_defaults()
    config.dataset = "imagenet2012"
    config.image_size = 224  # §1
    config.augmentation = "resized_crop"
    config.normalise = "unit"  # as the checkpoint was trained
    config.workers = 16  # processes that decode JPEG files
    config.batch_size = 512  # §4.1
    config.num_steps = 20_000  # §4.1
    config.seed = 42  # §4.1

    config.model = model_section("vit_b", patch_size=16)
    config.init_from = "ViT-B_16.npz"
    config.memory = "dropit"  # or "baseline", "exact", "lean", "leanest"
    config.dropit = dropit_section()  # other fields than the preset's: rate=0.9

    config.optimizer.learning_rate = 0.01  # §4.1
    # Not in the paper; Dosovitskiy et al., 2021, App. B.1.1 and their code.
    config.optimizer.clip_norm = 1.0
    config.schedule.name = "cosine"  # §4.1
    config.schedule.warmup_epochs = 500 * 512 / 1_281_167  # 500 steps of this batch
    config.checkpoint_steps = 500
    return variants.apply(config, variant, paper_rate=0.9)
