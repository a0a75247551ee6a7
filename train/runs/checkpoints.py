"""Checkpoints of a run: its state on the devices, and its place in the data."""

import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from train.processes.collective import any_of, is_first, synchronise
from train.processes.waiting import Background, WaitError
from train.runs import checksums, step_directories
from train.system import text
from train.system.disk import CheckpointError, check_room

# How many of the newest are kept, beside the best.
_LATEST = 2
# Bytes a second of a disk that is still waited for.
_SLOWEST = 10_000_000
# Characters of a message of Orbax's that are shown.
_LONGEST = 300
# The field of the position with the accuracy on the test examples, if it is known.
_ACCURACY = "test_accuracy"


class Checkpoints:
    """The checkpoints in a directory: the last two, and the best of test accuracy.

    Orbax writes each beside its place and moves it there when it is whole; older ones
    are removed after that: a run killed at any time leaves the checkpoint before. All
    processes of a run make the same calls.
    """

    def __init__(
        self,
        directory: Path,
        say: Callable[[str], None],
        *,
        read_only: bool = False,
        problem: Callable[[int, Any, Any], str] | None = None,
    ) -> None:
        """Opens the directory.

        Args:
          directory: of the checkpoints; it is made if need be.
          say: is told what was found that is not as it should be.
          read_only: whether nothing on disk may change.
          problem: says what is wrong with a restored step, its state and its position,
            which then count as damaged; nothing if it is empty.

        Raises:
          CheckpointError: what is half-written cannot be removed.
        """
        self._directory, self._say = directory.absolute(), say
        self._problem = problem
        self._accuracies: dict[int, float] = {}
        if not read_only:
            for path in step_directories.half_removed(self._directory):
                step_directories.remove_rest(path)
            for path in step_directories.half_written(self._directory):
                say(f"{path} was not written to its end: it is skipped and removed.")
                step_directories.remove_rest(path)
            synchronise("half_written")
        self._saving: int | None = None
        self._patience = 0.0
        self._background = Background(f"a checkpoint in {directory}")
        # Not Orbax's `read_only`, which warns of itself.
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._write_checksums
                ),
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
        )
        self._steps = step_directories.steps(self._directory)
        for step in self.steps():
            self._accuracies |= self._read_accuracy(step)

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, in order."""
        return sorted(self._steps)

    def best_step(self) -> int | None:
        """That of the highest test accuracy, the last of equal ones."""
        known = [
            (accuracy, step)
            for step, accuracy in self._accuracies.items()
            if step in self._steps and math.isfinite(accuracy)
        ]
        return max(known)[1] if known else None

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the position of a step.

        Args:
          step: one of `steps`.
          abstract: the state's shapes, dtypes and shardings.

        Raises:
          CheckpointError: it cannot be read, or is of another model.
        """
        result = self._read(step, abstract)
        if isinstance(result, str):
            raise CheckpointError(
                f"The checkpoint {self._path(step)} is damaged ({result}). Take "
                "another --step."
            )
        return result

    def restore_latest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The last step that can be read, its state and its position.

        Later ones, which cannot, are moved into `damaged/` beside the directory.

        Args:
          abstract: the state's shapes, dtypes and shardings.

        Returns:
          `None` if there is no checkpoint.

        Raises:
          CheckpointError: none can be read, or one is of another model.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            result = self._read(step, abstract)
            if not isinstance(result, str):
                self._put_aside(damaged, step)
                self._remove_old()  # a run that was killed may not have come to it
                return step, *result
            damaged[step] = result
        if damaged:
            reasons = "".join(f"\n  {step}: {why}" for step, why in damaged.items())
            raise CheckpointError(
                f"None of the checkpoints in {self._directory} can be read. Delete it "
                f"to start over.{reasons}"
            )
        return None

    def save(
        self,
        step: int,
        state: Any,
        position: dict[str, Any],
        test_accuracy: float | None,
    ) -> None:
        """Saves a step, unless it is there; writing goes on in the background.

        Args:
          step: how many steps have been done.
          state: the state after them.
          position: what else it takes to go on from there; it must be fit for JSON.
          test_accuracy: of the state, if it was evaluated.

        Raises:
          CheckpointError: this one, or the one before, cannot be written.
        """
        if step in self.steps():
            return
        self.wait()  # for the one before, whose step `_write_checksums` needs
        size = _size(state)
        self._patience = size / _SLOWEST
        self._check_room(size)
        self._saving = step
        try:
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                position=ocp.args.JsonSave(position | {_ACCURACY: test_accuracy}),
            )
            is_saved = self._background.call(
                lambda: self._manager.save(step, args=args), more=self._patience
            )
        except Exception as error:  # of many types: OSError, TensorStore's ValueError
            raise self._unwritable(error) from error
        if not is_saved:  # a later one has come to the directory meanwhile
            raise CheckpointError(
                f"Orbax does not save step {step} into {self._directory}: it has a "
                "later one, which is not of this run."
            )
        self._steps.add(step)
        if test_accuracy is not None:
            self._accuracies[step] = test_accuracy

    def wait(self) -> None:
        """Waits until all is written.

        Raises:
          CheckpointError: it cannot be.
        """
        try:
            self._background.call(
                self._manager.wait_until_finished, more=self._patience
            )
        except Exception as error:  # of many types, as above
            if self._saving is not None:
                self._steps.discard(self._saving)
                self._accuracies.pop(self._saving, None)
            raise self._unwritable(error) from error
        if self._saving is not None:
            self._saving = None
            self._remove_old()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:  # else there is one to be told already
                raise
        finally:
            with self._background:
                if self._background.is_idle:
                    self._close()

    def _check_room(self, needed: int) -> None:
        # Before Orbax sees it, whose threads write of their own what they fail at; and
        # in all processes, which would wait for the one that fails.
        try:
            check_room(self._directory, needed)
            problem = None
        except CheckpointError as error:
            problem = error
        if any_of(problem is not None):
            raise problem or CheckpointError(
                f"Another process cannot write to {self._directory}."
            )

    def _write_checksums(self) -> None:
        # Orbax calls it when all is written, and then gives the directory its name.
        if is_first():
            assert self._saving is not None
            (path,) = step_directories.half_written(self._directory, self._saving)
            checksums.write(path, self._saving)

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _close(self) -> None:
        try:
            self._manager.close()
        except Exception as error:  # of the writing, which `wait` has told
            del error

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]] | str:
        """The state and the position, or what is damaged; the same in all processes.

        Raises:
          CheckpointError: it is of another model.
          WaitError: the disk does not answer.
        """
        # Before Orbax sees it, whose threads write of their own what they fail at.
        problem = checksums.problem(self._path(step), step) if is_first() else ""
        if any_of(bool(problem)):
            return problem or "a file has changed"
        result: Any = None
        try:
            self._check_structure(step, abstract)
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                position=ocp.args.JsonRestore(),
            )
            result = self._background.call(
                lambda: self._manager.restore(step, args=args),
                more=_size(abstract) / _SLOWEST,
            )
        except (CheckpointError, WaitError):
            raise
        except Exception as error:  # of many types: Orbax's, TensorStore's, JSON's
            problem = _first_line(error)
        if any_of(bool(problem)):
            return problem or "another process cannot read it"
        state, position = result["state"], result["position"]
        if self._problem and (problem := self._problem(step, state, position)):
            return problem
        return state, position

    def _read_accuracy(self, step: int) -> dict[int, float]:
        try:
            args = ocp.args.Composite(position=ocp.args.JsonRestore())
            accuracy = self._manager.restore(step, args=args)["position"][_ACCURACY]
        except Exception:  # of many types: it is damaged, which `restore` will tell
            return {}
        return {step: accuracy} if isinstance(accuracy, float) else {}

    def _check_structure(self, step: int, abstract: Any) -> None:
        """Checks that a checkpoint has the arrays, and empty parts, that are wanted.

        Raises:
          CheckpointError: it has others.
        """
        found = _shapes(self._manager.item_metadata(step)["state"])
        wanted = _shapes(abstract)
        lines = [
            f"{text.shown(name)}: {found.get(name, 'absent')} in the checkpoint, "
            f"{wanted.get(name, 'absent')} in the model"
            for name in sorted(found | wanted)
            if found.get(name) != wanted.get(name)
        ]
        if lines:
            raise CheckpointError(
                f"The checkpoint {self._path(step)} is of another model: "
                f"{len(lines)} arrays differ.{text.lines(lines)}"
            )

    def _put_aside(self, damaged: dict[int, str], step: int) -> None:
        for number, why in damaged.items():
            source = self._path(number)
            target = self._directory.parent / "damaged" / str(number)
            while target.exists():
                target = target.with_name(f"{target.name}-again")
            step_directories.move(source, target)
            self._steps.discard(number)
            self._accuracies.pop(number, None)
            self._say(
                f"The checkpoint of step {number} is damaged ({why}). It is put aside "
                f"as {target}, and that of step {step} used."
            )
        if damaged:
            synchronise("put_aside")
            self._manager.reload()

    def _remove_old(self) -> None:
        """Removes all checkpoints but the newest and the best."""
        kept = {*self.steps()[-_LATEST:], self.best_step()}
        for step in [step for step in self.steps() if step not in kept]:
            self._steps.discard(step)
            self._accuracies.pop(step, None)
            try:
                step_directories.remove(self._path(step))
            except OSError as error:  # which costs room, and nothing else
                self._say(f"Cannot remove {self._path(step)}: {error}")

    def _unwritable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"A checkpoint cannot be written into {self._directory}: "
            f"{_first_line(error)} Those before are as they were; the same command "
            "goes on from the last when there is room."
        )


def _size(tree: Any) -> int:
    """The bytes of all arrays, or of what they are described by."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shapes(tree: Any) -> dict[str, tuple[int, ...] | str]:
    # Orbax wants the same empty dicts and tuples, too; of which type does not matter.
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree,
        is_leaf=lambda node: (
            not jax.tree_util.treedef_children(jax.tree.structure(node))
        ),
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            tuple(node.shape) if jax.tree.leaves(node) else "empty"
        )
        for path, node in flat
    }


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    # It has the names of files and, at the end, the reason.
    return f"{type(error).__name__}: {text.shown(lines[0], _LONGEST)}"
