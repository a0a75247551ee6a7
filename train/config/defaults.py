"""The default values of the fields of a config."""

from ml_collections import ConfigDict, config_dict

from train.config.config import dropit_section


def get_defaults() -> ConfigDict:
    """A config without what every file has to say.

    These are `dataset`, `image_size`, `batch_size`, `model`, `optimizer.learning_rate`
    and how long: `num_epochs` or `num_steps`.
    """
    config = ConfigDict()

    # Data.
    config.data_dir = ""  # where TFDS's datasets are; TFDS's own default if empty
    config.augmentation = "none"  # or "shift", "shift_flip", "resized_crop"
    config.normalise = "dataset"  # by its mean and deviation; or "unit": to [-1, 1]
    config.workers = 0  # processes that make batches; 0: threads of this one do

    # Length: in one of two units; of both, steps count.
    config.num_epochs = config_dict.placeholder(int)
    config.num_steps = config_dict.placeholder(int)
    config.seed = 42

    # Memory and precision.
    config.init_from = ""  # a .npz or .safetensors file of weights to start from
    config.dtype = (
        "float32"  # of the computation, or "bfloat16"; parameters are float32
    )
    # The preset of dropit_jax.drop around the loss: "exact", "dropit", "lean",
    # "leanest"; "baseline": the plain loss.
    config.memory = "baseline"
    config.layers = "flax"  # or "dropit": those of dropit_jax.linen
    config.dropit = dropit_section()  # the policy of the preset and the layers "dropit"
    config.remat = "none"  # or "blocks", or "dots": recomputed by jax.checkpoint
    config.accumulate_steps = 1  # parts of a batch that are computed one by one
    config.mesh = ConfigDict(
        {
            "data": -1,  # devices that share a batch; -1: all that are left
            "fsdp": 1,  # devices that share a batch and one copy of the state
        }
    )

    # Optimisation.
    config.optimizer = ConfigDict(
        {
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 0.0,
            "clip_norm": 0.0,  # of all gradients together; 0: not clipped
        }
    )
    config.schedule = ConfigDict(
        {
            "name": "cosine",  # or "step"
            "warmup_epochs": 0.0,
            "decay_epochs": (),  # of the step schedule
            "decay_factor": 0.1,
        }
    )
    config.label_smoothing = 0.0
    config.mixup = 0.0  # alpha of its beta distribution; 0: not mixed
    # Of the average of parameters, from the first ones on, which is evaluated; batch
    # statistics are not averaged. 0: none.
    config.ema_decay = 0.0

    # What is kept.
    config.evaluate_every = 1.0  # epochs
    config.checkpoint_steps = 0  # besides a checkpoint at every evaluation; 0: none
    config.profile_steps = ()  # (first, after the last): traced into workdir/profile
    return config
