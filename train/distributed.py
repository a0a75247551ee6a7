"""Several processes, on one host or on many, that train one model together."""

import jax
from absl import flags

from train.config import ConfigError

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Train with other processes. Under Slurm, Open MPI and Kubernetes they find each "
    "other; elsewhere the next three flags say where they are.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, for all processes the same."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes train together.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is: 0, 1, ...", lower_bound=0
)


def initialise() -> None:
    """Joins the other processes, if the flags say that there are any.

    It has to be called before JAX's devices are used.

    Raises:
      ConfigError: the flags are incomplete, or the processes do not find each other.
    """
    given = {
        flag.name: flag.value is not None
        for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
    }
    if not _DISTRIBUTED.value and not any(given.values()):
        return
    if any(given.values()) and not all(given.values()):
        missing = ", ".join(f"--{name}" for name, there in given.items() if not there)
        raise ConfigError(
            "Processes are told of each other by --coordinator_address, "
            f"--num_processes and --process_id; missing: {missing}."
        )
    try:
        jax.distributed.initialize(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            # Else Slurm and Open MPI, where there are any, would have the last word,
            # and give each process one GPU.
            cluster_detection_method="deactivate" if all(given.values()) else None,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The processes do not find each other: {error} Outside of Slurm, Open MPI "
            "and Kubernetes, give --coordinator_address, --num_processes and "
            "--process_id."
        ) from error
