"""Runs the commands of `train` on a task of seconds, as `python -m` would.

Each is a process of its own, forked from one that has imported what all of them import,
which takes longer than most of them.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

from dropit_jax import memory
from train import models
from train.runs import records

ROOT = Path(__file__).parents[2]

# A model with running statistics; to be run with `small=True`.
TINY = (
    "--config=configs/digits_resnet18.py",
    "--config.image_size=8",
    "--config.model.width=4",
    "--config.batch_size=32",
    "--config.num_epochs=6",
    "--config.optimizer.learning_rate=0.05",
)

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # as `python -m` sets it before it imports JAX
    # What is compiled once is not compiled again by the next command.
    "JAX_COMPILATION_CACHE_DIR": str(
        Path(tempfile.gettempdir()) / f"dropit-jax-tests-{os.getuid()}"
    ),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}

# A ResNet-18 of two blocks: most of the time is that of compilation.
SMALL_RESNET = {"resnet18": models._resnet(models.BasicBlock, 1, 1)}
_SMALL_RESNET = "DROPIT_JAX_TESTS_SMALL_RESNET"

# Not the commands themselves, which run as `__main__`.
_IMPORTED = ("sklearn.datasets", "train.cli", "train.loop", "train.reports.plots")
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(list(_IMPORTED))


class Command:
    """A command under way, with the interface of `subprocess.Popen` for text."""

    def __init__(self, module, arguments, variables):
        readers, writers = zip(
            *(_SERVER.Pipe(duplex=False) for _ in range(2)), strict=True
        )
        self._process = _SERVER.Process(
            target=_execute, args=(module, arguments, variables, *writers)
        )
        # The server starts with the first command, and JAX is imported there.
        with mock.patch.dict(os.environ, _ENVIRONMENT):
            self._process.start()
        for writer in writers:
            writer.close()
        self._texts = ["", ""]
        self._threads = [
            threading.Thread(target=self._read, args=(number, reader))
            for number, reader in enumerate(readers)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, number, reader):
        with os.fdopen(os.dup(reader.fileno())) as stream:
            self._texts[number] = stream.read()
        reader.close()

    @property
    def pid(self):
        return self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def communicate(self):
        """Waits for the end: what it printed, and its errors."""
        self._process.join()
        for thread in self._threads:
            thread.join()
        return tuple(self._texts)


def _execute(module, arguments, variables, out, errors):
    """Runs a module in this new process, which ends with it."""
    os.environ.update(variables)
    os.chdir(ROOT)
    if _SMALL_RESNET in variables:
        models._MODELS.update(SMALL_RESNET)
    # Which the tests may have been told to ignore, in the background or by `nohup`.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    for descriptor, connection in ((1, out), (2, errors)):
        os.dup2(connection.fileno(), descriptor)
        connection.close()
    sys.argv = [module, *arguments]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        atexit._run_exitfuncs()  # a child of a fork leaves these out
    sys.exit(status)


def start(module, *arguments, devices=1, variables=(), small=False):
    """Starts `python -m module`; with `small`, a ResNet-18 is `SMALL_RESNET`."""
    settings = {
        **_ENVIRONMENT,
        # Compiled as for users: rounding decides what is trained in the end.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **dict(variables),
        **({_SMALL_RESNET: "1"} if small else {}),
    }
    return Command(module, [*map(str, arguments)], settings)


def run(module, *arguments, **settings):
    """Runs `python -m module` to its end: (exit status, output, errors).

    The settings are those of `start`.
    """
    process = start(module, *arguments, **settings)
    out, errors = process.communicate()
    if process.returncode == 2 and errors.startswith("error: XLA's GPU compiler"):
        raise memory.CompilerMissingError(errors)
    return process.returncode, out, errors


def wait_for(condition, process):
    """Waits until a condition holds, which it does before the process ends."""
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"It ended too early: {process.communicate()}")
        time.sleep(0.01)


def metrics(workdir):
    """The rows of a run, but for what depends on the clock."""
    clocked = ("images_per_second", "data_wait")
    return [
        {name: value for name, value in row.items() if name not in clocked}
        for row in records.read(workdir / "metrics.csv")
    ]


def steps(workdir):
    """The steps of a run's whole checkpoints."""
    paths = (workdir / "checkpoints").glob("*")
    return sorted(int(path.name) for path in paths if path.name.isdigit())
