"""Checkpoints of a run: its state on the devices, and its position in the data."""

import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from train.processes.collective import any_process, is_first, synchronise
from train.processes.waiting import Background, WaitError
from train.runs.checkpoints import checksums, step_directories, structure
from train.system import text
from train.system.disk import CheckpointError, check_room

# Number of latest checkpoints that are kept, besides the best one.
_KEPT_LATEST = 2
# Bytes a second of the slowest supported disk; sets the time limit of a call.
_SLOWEST_DISK = 10_000_000
# Characters that are shown of an error message of Orbax.
_MAX_CHARACTERS = 300
# Field that a saved position has in addition: the test accuracy, or None if unknown.
_ACCURACY_FIELD = "test_accuracy"
# Field with the version of the format. Version 1 has no such field, and at first had no
# rows of `metrics.csv` in the position; `Position.from_json` reads it.
_VERSION_FIELD = "version"
_VERSION = 2


class Checkpoints:
    """The checkpoints of a run: the last two, and that with the best test accuracy.

    Used in a `with` statement, whose end waits for the last writing. All processes of a
    run must make the same calls.

    Orbax writes each checkpoint to a temporary directory and renames it when it is
    complete. Older ones are removed only afterwards, so that a run killed at any time
    leaves at least the previous checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        say: Callable[[str], None] = print,
        *,
        read_only: bool = False,
        problem: Callable[[int, Any, Any], str] | None = None,
    ) -> None:
        """Opens the directory and removes half-written checkpoints from it.

        Args:
          directory: directory of the checkpoints; created if it does not exist.
          say: called with messages about damaged or half-written checkpoints.
          read_only: whether to create and remove nothing on opening.
          problem: returns what is wrong with a restored step, state and position, or
            "". A checkpoint with a problem counts as damaged.

        Raises:
          CheckpointError: a half-written checkpoint cannot be removed.
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
        self._extra_seconds = 0.0
        self._background = Background(f"a checkpoint in {directory}")
        # Orbax's own `read_only` option would log a warning.
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
        """Returns the steps of the checkpoints, in ascending order."""
        return sorted(self._steps)

    def best_step(self) -> int | None:
        """Returns the step of the highest test accuracy, the last of equal ones.

        Returns `None` if no checkpoint has a finite test accuracy.
        """
        known = [
            (accuracy, step)
            for step, accuracy in self._accuracies.items()
            if step in self._steps and math.isfinite(accuracy)
        ]
        return max(known)[1] if known else None

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state and the position of a step.

        Args:
          step: one of `steps`.
          abstract: shapes, dtypes and shardings of the state.

        Raises:
          CheckpointError: the checkpoint is damaged, of another model, or of a later
            format.
          WaitError: the disk does not answer.
        """
        result = self._read(step, abstract)
        if isinstance(result, str):
            raise CheckpointError(
                f"The checkpoint {self._path(step)} is damaged ({result}). Take "
                "another --step."
            )
        return result

    def restore_latest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the last checkpoint that is intact.

        Moves later checkpoints, which are damaged, into `damaged/` beside the
        directory, unless all are damaged. Removes old checkpoints, as `wait` does.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Returns:
          The step, the state and the position, or `None` if there is no checkpoint.

        Raises:
          CheckpointError: all checkpoints are damaged, one is of another model or of a
            later format, or a damaged one cannot be moved.
          WaitError: the disk does not answer.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            result = self._read(step, abstract)
            if not isinstance(result, str):
                self._move_damaged(damaged, step)
                self._remove_old()  # a killed run may have left old checkpoints
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
        """Saves a step in the background, unless a checkpoint of it exists.

        Args:
          step: number of steps done.
          state: state after these steps.
          position: all else that a run needs to go on; JSON must be able to represent
            it.
          test_accuracy: test accuracy of the state, or `None` if it was not evaluated.

        Raises:
          CheckpointError: this checkpoint or the previous one cannot be written.
        """
        if step in self.steps():
            return
        self.wait()  # `_write_checksums` still needs the step of the previous one
        size = _byte_count(state)
        self._extra_seconds = size / _SLOWEST_DISK
        self._check_room(size)
        self._saving = step
        try:
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                position=ocp.args.JsonSave(
                    position
                    | {_ACCURACY_FIELD: test_accuracy, _VERSION_FIELD: _VERSION}
                ),
            )
            is_saved = self._background.call(
                lambda: self._manager.save(step, args=args), more=self._extra_seconds
            )
        except Exception as error:  # any type: OSError, TensorStore's ValueError
            raise self._write_error(error) from error
        if not is_saved:  # another program has put a later step into the directory
            raise CheckpointError(
                f"Orbax does not save step {step} into {self._directory}: it has a "
                "later one, which is not of this run."
            )
        self._steps.add(step)
        if test_accuracy is not None:
            self._accuracies[step] = test_accuracy

    def wait(self) -> None:
        """Waits for the checkpoint that is being saved; then removes old checkpoints.

        Raises:
          CheckpointError: the checkpoint cannot be written.
        """
        try:
            self._background.call(
                self._manager.wait_until_finished, more=self._extra_seconds
            )
        except Exception as error:  # any type, as above
            if self._saving is not None:
                self._steps.discard(self._saving)
                self._accuracies.pop(self._saving, None)
            raise self._write_error(error) from error
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
            if self._background.is_idle:  # not after a `WaitError`
                self.wait()
        except CheckpointError:
            if error is None:  # otherwise the earlier error is the one to report
                raise
        finally:
            with self._background:
                if self._background.is_idle:
                    self._close()

    def _check_room(self, needed: int) -> None:
        # Checked before Orbax writes, whose threads print their own errors. All
        # processes raise, since they would otherwise wait for the one that fails.
        try:
            check_room(self._directory, needed)
            problem = None
        except CheckpointError as error:
            problem = error
        if any_process(problem is not None):
            raise problem or CheckpointError(
                f"Another process cannot write to {self._directory}."
            )

    def _write_checksums(self) -> None:
        # Orbax calls this when all files are written, before it renames the directory.
        if is_first():
            assert self._saving is not None
            (path,) = step_directories.half_written(self._directory, self._saving)
            checksums.wait_for_orbax(path)
            checksums.write(path, self._saving)

    def _check_version(self, step: int, position: Any) -> None:
        version = position.get(_VERSION_FIELD, 1) if isinstance(position, dict) else 1
        if isinstance(version, int) and version > _VERSION:
            raise CheckpointError(
                f"The checkpoint {self._path(step)} has format {version}, of a later "
                f"version of this program, which reads up to {_VERSION}: update it."
            )

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _close(self) -> None:
        try:
            self._manager.close()
        except Exception as error:  # from the writing: `wait` has reported it
            del error

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]] | str:
        """Returns state and position, or a description of the damage.

        All processes agree on whether the checkpoint is damaged.

        Raises:
          CheckpointError: the checkpoint is of another model, or of a later format.
          WaitError: the disk does not answer.
        """
        # Checked before Orbax reads, whose threads print their own errors.
        problem = checksums.problem(self._path(step), step) if is_first() else ""
        if any_process(bool(problem)):
            return problem or "a file has changed"
        result: Any = None
        try:
            # First: a later format may have other arrays.
            self._check_version(
                step, self._background.call(lambda: self._read_position(step))
            )
            found = self._manager.item_metadata(step)["state"]
            structure.check(self._path(step), found, abstract)
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                position=ocp.args.JsonRestore(),
            )
            result = self._background.call(
                lambda: self._manager.restore(step, args=args),
                more=_byte_count(abstract) / _SLOWEST_DISK,
            )
        except (CheckpointError, WaitError):
            raise
        except Exception as error:  # any type: Orbax's, TensorStore's, JSON's
            problem = _first_line(error)
        if any_process(bool(problem)):
            return problem or "another process cannot read it"
        state, position = result["state"], result["position"]
        if self._problem and (problem := self._problem(step, state, position)):
            return problem
        return state, position

    def _read_position(self, step: int) -> Any:
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["position"]

    def _read_accuracy(self, step: int) -> dict[int, float]:
        try:
            accuracy = self._read_position(step)[_ACCURACY_FIELD]
        except Exception:  # any type: the checkpoint is damaged, as `restore` reports
            return {}
        return {step: accuracy} if isinstance(accuracy, float) else {}

    def _move_damaged(self, damaged: dict[int, str], step: int) -> None:
        """Moves damaged checkpoints into `damaged/`.

        Args:
          damaged: description of the damage, by step.
          step: the step that is used instead.
        """
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
        """Removes all checkpoints except the latest two and the best."""
        kept = {*self.steps()[-_KEPT_LATEST:], self.best_step()}
        for step in [step for step in self.steps() if step not in kept]:
            self._steps.discard(step)
            self._accuracies.pop(step, None)
            try:
                step_directories.remove(self._path(step))
            except OSError as error:  # costs disk space only: the run goes on
                self._say(f"Cannot remove {self._path(step)}: {error}")

    def _write_error(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"A checkpoint cannot be written into {self._directory}: "
            f"{_first_line(error)} Those before are as they were; the same command "
            "goes on from the last when there is room."
        )


def _byte_count(tree: Any) -> int:
    """Returns the bytes of a pytree of arrays or of `jax.ShapeDtypeStruct`s."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    # The first line has the names of files and, at its end, the reason.
    return f"{type(error).__name__}: {text.shorten(lines[0], _MAX_CHARACTERS)}"
