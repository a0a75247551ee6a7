"""The default values of the fields of a config."""

from ml_collections import ConfigDict, config_dict

from train.config.config import dropit_section


def get_defaults() -> ConfigDict:
    """Returns a config of default values, without the fields that have no default.

    Every config file sets `dataset`, `image_size`, `batch_size`, `model`,
    `optimizer.learning_rate`, and `num_epochs` or `num_steps`.
    """
    config = ConfigDict()

    # Data.
    config.data_dir = ""  # directory of TFDS's datasets; empty: TFDS's default
    config.augmentation = "none"  # or "shift", "shift_flip", "resized_crop"
    config.normalise = "dataset"  # by its mean and deviation; or "unit": to [-1, 1]
    config.workers = 0  # processes that make batches; 0: threads of this process

    # Length of the run, in epochs or in steps; with both, the steps decide.
    config.num_epochs = config_dict.placeholder(int)
    config.num_steps = config_dict.placeholder(int)
    config.seed = 42

    # Memory and precision.
    config.init_from = ""  # a .npz or .safetensors file of weights to start from
    config.dtype = (
        "float32"  # dtype of the computation, or "bfloat16"; parameters are float32
    )
    # The preset of dropit_jax.drop for the loss: "exact", "dropit", "lean", "leanest";
    # "baseline": the plain loss.
    config.memory = "baseline"
    config.layers = "flax"  # or "dropit": the layers of dropit_jax.linen
    config.dropit = dropit_section()  # the policy of the preset and the layers "dropit"
    config.remat = "none"  # or "blocks", or "dots": recomputed by jax.checkpoint
    config.accumulate_steps = 1  # parts of a batch, computed one by one
    config.mesh = ConfigDict(
        {
            "data": -1,  # devices that share a batch; -1: all other devices
            "fsdp": 1,  # devices that share a batch and one copy of the state
        }
    )

    # Optimisation.
    config.optimizer = ConfigDict(
        {
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 0.0,
            "clip_norm": 0.0,  # largest norm of all gradients together; 0: any
        }
    )
    config.schedule = ConfigDict(
        {
            "name": "cosine",  # or "step"
            "warmup_epochs": 0.0,
            "decay_epochs": (),  # of the schedule "step"
            "decay_factor": 0.1,
        }
    )
    config.label_smoothing = 0.0
    config.mixup = 0.0  # alpha of its beta distribution; 0: images are not mixed
    # Decay of the exponential moving average of the parameters, from the initial ones
    # on. The average is evaluated. Batch statistics are not averaged. 0: no average.
    config.ema_decay = 0.0

    # Evaluations, checkpoints and traces.
    config.evaluate_every = 1.0  # epochs
    config.checkpoint_steps = 0  # steps between checkpoints without evaluation; 0: none
    config.profile_steps = ()  # (first, last + 1), traced into workdir/profile
    return config
