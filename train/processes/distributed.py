"""Start of distributed training: joining the processes and comparing their configs."""

import collections
import sys
import threading
from collections.abc import Sequence
from importlib import metadata

import jax
from absl import flags
from ml_collections import ConfigDict

from train.config import config as config_lib
from train.config.config import ConfigError
from train.processes.collective import any_process, broadcast_from_first
from train.system import text

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
# Seconds of waiting before the user is told about it.
_SECONDS_BEFORE_NOTICE = 20
# Fields of the config that may differ between hosts.
_PER_HOST_FIELDS = ("data_dir", "profile_steps", "workers")
# Packages whose versions must be the same in all processes.
_PACKAGES = (
    *("dropit-jax", "flax", "jax", "jaxlib", "ml-collections", "numpy", "optax"),
    "orbax-checkpoint",
)


def initialise() -> None:
    """Joins the other processes if the flags ask for distributed training.

    Must be called before JAX's devices are used.

    Raises:
      ConfigError: the flags are incomplete, the processes do not find each other, or
        one has more devices than another.
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
    # `initialize` waits up to five minutes for the other processes.
    notice = threading.Timer(
        _SECONDS_BEFORE_NOTICE,
        print,
        ["Waiting for the other processes ..."],
        {"file": sys.stderr},
    )
    notice.daemon = True
    notice.start()
    try:
        jax.distributed.initialize(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            # Otherwise Slurm or Open MPI, if present, would override the flags and give
            # each process a single GPU.
            cluster_detection_method="deactivate" if all(given.values()) else None,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The processes do not find each other: {error} Outside of Slurm, Open MPI "
            "and Kubernetes, give --coordinator_address, --num_processes and "
            "--process_id."
        ) from error
    finally:
        notice.cancel()
    check_equal_devices(jax.devices())


def check_equal_devices(devices: Sequence[jax.Device]) -> None:
    """Checks that every process has as many devices as the others.

    Args:
      devices: the devices of all processes.

    Raises:
      ConfigError: one has more devices than another.
    """
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"process {i} has {n}" for i, n in sorted(counts.items()))
        raise ConfigError(f"All processes need as many devices, but {listed}.")


def check_same_config(config: ConfigDict) -> None:
    """Checks that all processes have the same config and versions of packages.

    Raises:
      ConfigError: a process differs from the first; all processes raise, and the error
        of a differing process lists the differences.
    """
    if jax.process_count() == 1:
        return
    own = _description(config)
    first = broadcast_from_first(own)
    lines = [
        f"{name}: {text.shorten(first.get(name, 'absent'))} in process 0, "
        f"{text.shorten(own.get(name, 'absent'))} in process {jax.process_index()}"
        for name in sorted(first | own)
        if first.get(name) != own.get(name)
    ]
    if any_process(bool(lines)):
        raise ConfigError(
            "All processes need the same config and versions of packages."
            + (text.join_lines(lines) or " Another process names what differs.")
        )


def _description(config: ConfigDict) -> dict[str, str]:
    """Returns versions and config fields that all processes must share, as text."""
    versions = {"Python": sys.version.split()[0]}
    for name in _PACKAGES:
        versions[name] = metadata.version(name)
    fields = config_lib.flat(config)
    return versions | {
        f"config.{name}": repr(value)
        for name, value in fields.items()
        if name not in _PER_HOST_FIELDS
    }
