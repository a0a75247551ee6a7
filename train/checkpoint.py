"""Checkpoints of a run: its state on the devices, and its place in the data."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from train.step import State


class Checkpoints:
    """The checkpoints in a directory; the last two are kept.

    Orbax writes each beside its place and moves it there when it is whole, so that a
    run killed at any time leaves the checkpoint before.
    """

    def __init__(self, directory: Path) -> None:
        """Opens the directory, and makes it if need be."""
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, cleanup_tmp_directories=True
            ),
            item_names=("state", "position"),
        )

    def latest_step(self) -> int | None:
        """The step of the last whole checkpoint; `None` if there is none."""
        return self._manager.latest_step()

    def restore(
        self, step: int, abstract_state: State, sharding: jax.sharding.Sharding
    ) -> tuple[State, dict[str, Any]]:
        """The state, with its arrays in that sharding, and the position of a step."""
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            abstract_state,
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(placed),
                position=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], restored["position"]

    def save(self, step: int, state: State, position: dict[str, Any]) -> None:
        """Saves a step, once; writing goes on in the background.

        Args:
          step: how many steps have been done.
          state: the state after them.
          position: what else it takes to go on from there; it must be fit for JSON.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                position=ocp.args.JsonSave(position),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()
