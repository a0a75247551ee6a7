"""A grid that takes seconds, for `train.ablation`."""

from ml_collections import ConfigDict

from configs import digits_vit
from train.config.config import dropit_section


def get_config():
    base = digits_vit.get_config()
    base.batch_size = 32
    base.num_epochs = None
    base.num_steps = 80
    base.evaluate_every = 1.0
    variants = {
        "baseline": {"memory": "baseline", "dropit": dropit_section(), "seeds": (3, 4)},
        "half": {"memory": "dropit", "dropit": dropit_section(rate=0.5), "seeds": (3,)},
    }
    return ConfigDict({"base": base, "variants": variants})
