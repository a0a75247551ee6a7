"""The frame of all commands: their flags, errors in one line, exit statuses."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from dropit_jax.memory import CompilerError, NoBatchFitsError, TargetError
from train.config import config as config_lib
from train.config import validation
from train.config.config import ConfigError
from train.data import DataError
from train.engine.meter import NonFiniteLossError
from train.processes.interrupts import Interrupted, install_exit_handlers
from train.processes.waiting import WaitError, is_abandoned
from train.runs.lock import LockedError
from train.runs.records import RecordsError
from train.system import library_output
from train.system.children import end_workers
from train.system.disk import CheckpointError
from train.system.paths import PathError, user_path
from train.system.text import printable, shorten
from train.weights import WeightsError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to train; its fields are flags too: --config.seed=1."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints and metrics go; a run in it is resumed."
)

# Characters shown of a flag's error message.
_LONGEST_REASON = 1000
# Exit status after an error that the user can mend.
_FAILED = 2
# Errors that the user can mend: printed in one line, without a trace.
_USER_ERRORS = (
    CheckpointError,
    ConfigError,
    CompilerError,
    DataError,
    LockedError,
    NoBatchFitsError,
    NonFiniteLossError,
    PathError,
    RecordsError,
    TargetError,
    WaitError,
    WeightsError,
)


def launch(job: Callable[[ConfigDict, Path], None], needs_workdir: bool = True) -> None:
    """Parses the flags, runs the job on config and workdir, and exits.

    The exit status is 0, 1 after a defect of the program, 2 after an error that the
    user can mend, or 128 plus the number of the signal that stopped the job.

    Args:
      job: function of the config and the workdir.
      needs_workdir: if false, `--workdir` is an error, and the job gets `Path()`.
    """

    def checked(arguments: list[str]) -> None:
        _check_no_arguments(arguments)
        if _WORKDIR.value and not needs_workdir:
            raise ConfigError("This command writes nothing: leave out --workdir.")
        job(_CONFIG.value, _workdir() if needs_workdir else Path())

    _run(checked, ["config", *(["workdir"] if needs_workdir else [])])


def launch_on_workdir(job: Callable[[Path], None]) -> None:
    """Parses the flags, runs the job on the workdir of a run, and exits as `launch`."""

    def checked(arguments: list[str]) -> None:
        _check_no_arguments(arguments)
        if _CONFIG.value is not None:
            raise ConfigError("The config is that in --workdir: leave out --config.")
        job(_workdir())

    _run(checked, ["workdir"])


def launch_on_directories(job: Callable[[list[Path]], None]) -> None:
    """Parses the flags, runs the job on the named directories, exits as `launch`."""

    def checked(directories: list[str]) -> None:
        if _CONFIG.value is not None or _WORKDIR.value is not None:
            raise ConfigError(
                "Give the directories of runs without --config and --workdir."
            )
        if not directories:
            raise ConfigError("Give the directories of runs.")
        for directory in directories:
            if not user_path(directory).is_dir():
                raise ConfigError(f"{shorten(directory)} is not a directory.")
        job([user_path(directory) for directory in directories])

    _run(checked, [])


def _workdir() -> Path:
    if not _WORKDIR.value:
        raise ConfigError("--workdir= is empty: name a directory.")
    return user_path(_WORKDIR.value)


def _check_no_arguments(arguments: list[str]) -> None:
    if arguments:
        raise ConfigError(f"Unexpected argument: {shorten(repr(arguments[0]))}.")


def _run(job: Callable[[list[str]], None], required: list[str]) -> None:
    def main(argv: Sequence[str]) -> int:
        install_exit_handlers()
        if jax.config.jax_numpy_dtype_promotion != "standard":
            # Flax's norms in bfloat16 and Optax's schedules need it.
            print("JAX_NUMPY_DTYPE_PROMOTION is taken as 'standard'.", file=sys.stderr)
            jax.config.update("jax_numpy_dtype_promotion", "standard")
        status = _status(lambda: job(list(argv[1:])))
        # At exit Python waits for threads of libraries and for other processes, which
        # may hang after an error.
        if status in (1, _FAILED) or is_abandoned():
            sys.stdout.flush()
            sys.stderr.flush()
            end_workers()
            os._exit(status)
        return status

    flags.mark_flags_as_required(required)
    app.run(main, flags_parser=_parse_flags)


def _status(job: Callable[[], None]) -> int:
    """Runs the job, prints an error or a signal, and returns the exit status."""
    try:
        job()
    except _USER_ERRORS as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return _FAILED
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 128 + interrupted.signum
    except Exception:  # a defect of the program
        traceback.print_exc()
        return 1
    return 0


def _parse_flags(argv: list[str]) -> list[str]:
    library_output.silence_libraries()
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.keys()  # raises, if the file failed to load
        return rest
    except flags.Error as error:
        # For a config file that raises, the message is a trace: take its last line.
        message = str(error).strip().splitlines()
        reason = message[0] if len(message) == 1 else f"--config: {message[-1].strip()}"
    except RecursionError:  # in absl's search for a flag of a similar name
        reason = "The name of a flag is too long, or the config file calls itself."
    except Exception as error:  # of any type: a config file is a program
        reason = f"--config: {_unknown_override(argv) or _message_of(error)}"
    print(f"error: {shorten(reason, _LONGEST_REASON)}", file=sys.stderr)
    sys.exit(2)


def _unknown_override(argv: list[str]) -> str:
    """Returns a message on the first flag for a field that the config lacks, or "".

    The error that ml_collections raises has only the last part of the field's name.
    """
    files = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    try:
        config = flags.FLAGS["config"].parser.parse(files[-1])
        names = config_lib.flat(config)
    except Exception:  # the config file itself fails: `_message_of` tells its error
        return ""
    for word in argv:
        match = re.match(r"--?config\.([^=]+)", word)
        if match and not any(f"{name}.".startswith(f"{match[1]}.") for name in names):
            return validation.unknown_field(names, match[1])
    return ""


def _message_of(error: Exception) -> str:
    """Returns the text of an error in one line, without repr's quotes and escapes.

    ml_collections raises some errors with the repr of another error's text.
    """
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    if not isinstance(
        error, (AttributeError, KeyError, OSError, TypeError, ValueError)
    ):
        text = f"{type(error).__name__}: {text}"
    if text.startswith("'\\'"):
        text = text[1:-1]
    return " ".join(text.replace("\\'", "'").replace("\\n", " ").split())
