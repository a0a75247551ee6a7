"""Collective operations on small values among the processes that train one model.

All but `is_first` must be called by every process, in the same order.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Returns whether this is the first process, which writes files and progress."""
    return jax.process_index() == 0


def synchronise(name: str) -> None:
    """Waits until all processes have called it with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def must_stop(step: int) -> bool:
    """Returns whether to save after this step and stop, as a process got SIGTERM.

    All processes call it after every step, and JAX agrees on one step for all. Always
    false with a single process.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
        step
    )


def any_process(flag: bool) -> bool:
    """Returns, in all processes, whether the flag is true in at least one of them."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def broadcast_from_first(value: Any) -> Any:
    """Returns, in all processes, the value that the first one passed.

    With several processes, it is parsed from JSON: a tuple becomes a list.

    Args:
      value: any value that JSON can represent; ignored in the other processes.
    """
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size, b"\0"), np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
