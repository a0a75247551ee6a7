"""ResNet-18 on scikit-learn's handwritten digits: minutes on a CPU, no download.

The images are scaled to CIFAR's 32x32, for which the model's stem is made.
"""

from ml_collections import ConfigDict, config_dict

from train.config import dropit_section


def get_config() -> ConfigDict:
    """The config; every field can be overridden on the command line."""
    config = ConfigDict()
    config.dataset = "digits"
    config.data_dir = ""  # the images come with scikit-learn
    config.image_size = 32
    config.batch_size = 64
    config.num_epochs = 10
    config.num_steps = config_dict.placeholder(int)  # where given, instead of epochs
    config.seed = 42  # as in the paper, §4.1

    config.model = ConfigDict({"name": "resnet18", "width": 16, "stem": "cifar"})

    config.memory = "dropit"  # or "baseline", plain Flax, or "lean"
    config.remat = "none"  # or "blocks", or "dots"
    config.dropit = dropit_section()  # where the policy is not that of config.memory

    config.optimizer = ConfigDict(
        {
            "learning_rate": 0.1,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 5e-4,
        }
    )
    config.schedule = ConfigDict(
        {
            "name": "cosine",
            "warmup_epochs": 1.0,
            "decay_epochs": (),  # of the step schedule
            "decay_factor": 0.1,
        }
    )
    return config
