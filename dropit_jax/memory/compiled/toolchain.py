"""Finds XLA's GPU compiler: JAX's CUDA plugin, and the files of CUDA that it reads.

Neither a GPU nor an installed CUDA is needed. The compiler is installed in a directory
of its own, not in the environment's site-packages: from there JAX would load the plugin
at every start, and report the lack of a GPU.
"""

import dataclasses
import os
import re
import shlex
import site
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import jax

# The environment variable that, if set, names the only directory to search.
COMPILER_PATH_VARIABLE = "DROPIT_GPU_COMPILER"


@dataclasses.dataclass(frozen=True)
class _Release:
    """JAX's plugin for one release of CUDA.

    Attributes:
      package: the package of the plugin.
      cuda_packages: NVIDIA's packages with the files of CUDA.
      cuda: the path of these files, relative to an installation directory.
    """

    package: str
    cuda_packages: tuple[str, ...]
    cuda: Path

    @property
    def module(self) -> str:
        """The plugin's top-level module."""
        return self.package.replace("-", "_")


_RELEASES = (
    _Release(
        "jax-cuda12-plugin", ("nvidia-cuda-nvcc-cu12",), Path("nvidia", "cuda_nvcc")
    ),
    _Release(
        "jax-cuda13-plugin", ("nvidia-cuda-nvcc", "nvidia-nvvm"), Path("nvidia", "cu13")
    ),
)
_PIP = "pip install --upgrade"
_JAXLIB = metadata.version("jaxlib")

# The assembler of GPU code, and the library of mathematical functions.
_CUDA_FILES = (Path("bin", "ptxas"), Path("nvvm", "libdevice", "libdevice.10.bc"))


@dataclasses.dataclass(frozen=True)
class _Plugin:
    """An installed plugin, and the version and directory of the installation."""

    release: _Release
    directory: Path
    version: str


class CompilerError(RuntimeError):
    """The GPU compiler failed."""


class CompilerMissingError(CompilerError):
    """The GPU compiler, or a part of it, is not installed."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """An installed GPU compiler.

    Attributes:
      plugin: the directory that holds JAX's plugin.
      cuda: the directory that holds `bin/ptxas` and `nvvm/libdevice`.
    """

    plugin: Path
    cuda: Path

    def environment(self, xla_flags: str) -> dict[str, str]:
        """Returns the environment variables for a process that compiles.

        They hide any other CUDA: JAX takes one from `CUDA_ROOT`, and XLA `nvlink` from
        `PATH`.

        Args:
          xla_flags: options of XLA, which replace those of this process.
        """
        return os.environ | {
            "CUDA_ROOT": str(self.cuda),
            "PATH": str(self.cuda / "bin"),
            "XLA_FLAGS": f"{xla_flags} --xla_gpu_cuda_data_dir={self.cuda}",
            "PYTHONPATH": os.pathsep.join([str(self.plugin), *_import_path()]),
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": str(jax.config.jax_enable_x64),
            # XLA writes no buffer assignment for a program from the cache.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }


def find() -> Toolchain:
    """Returns the GPU compiler that belongs to the installed JAX.

    Searches the directory that `DROPIT_GPU_COMPILER` names. If the variable is not set,
    searches `gpu-compiler` in `sys.prefix` and in the user's base directory, then
    `sys.path`.

    Raises:
      CompilerMissingError: a part of the compiler is not installed. The message has one
        sentence, and the command that installs the part.
    """
    directories = list(_directories())
    plugins = [
        _Plugin(release, directory, version)
        for release in _RELEASES
        for directory in directories
        if (version := _version(release, directory)) is not None
    ]
    for plugin in filter(_matches_jaxlib, plugins):
        for directory in directories:
            cuda = directory / plugin.release.cuda
            if all((cuda / file).is_file() for file in _CUDA_FILES):
                return Toolchain(plugin.directory, cuda)
    raise CompilerMissingError(_missing_message(plugins))


def _missing_message(plugins: Sequence[_Plugin]) -> str:
    """Returns the message on the missing part, with the command that installs it."""
    for plugin in filter(_matches_jaxlib, plugins):
        packages = " ".join(plugin.release.cuda_packages)
        return (
            f"XLA's GPU compiler in {plugin.directory} lacks NVIDIA's ptxas and "
            f"libdevice: {_PIP} --target {_install_directory()} {packages}"
        )
    release = _RELEASES[0]
    packages = " ".join((f"{release.package}=={_JAXLIB}", *release.cuda_packages))
    command = f"{_PIP} --target {_install_directory()} {packages}"
    for plugin in plugins:
        return (
            f"XLA's GPU compiler in {plugin.directory} is of JAX {plugin.version}, and "
            f"this is JAX {_JAXLIB}: {command}"
        )
    return (
        "XLA's GPU compiler is not installed; it needs Linux, but neither a GPU nor "
        f"CUDA: {command}"
    )


def _install_directory() -> str:
    """Returns the directory to install into, quoted for a shell."""
    return shlex.quote(str(next(_directories())))


def _directories() -> Iterator[Path]:
    """Yields the directories to search, in order; the first is the one to install into.

    Of the environment and the user's base directory, a writable one comes first.
    """
    if named := os.environ.get(COMPILER_PATH_VARIABLE):
        yield Path(named).absolute()
        return
    roots = sorted((sys.prefix, site.getuserbase()), key=_is_read_only)
    yield from (Path(root, "gpu-compiler") for root in roots)
    yield from map(Path, _import_path())


def _is_read_only(directory: str) -> bool:
    return not os.access(directory, os.W_OK)


def _import_path() -> list[str]:
    return [entry or str(Path.cwd()) for entry in sys.path]


def _version(release: _Release, directory: Path) -> str | None:
    """Returns the version of the plugin in a directory; `None` if it has none."""
    if not (directory / release.module).is_dir():
        return None
    installed = metadata.Distribution.discover(
        name=release.package, path=[str(directory)]
    )
    return next((each.version for each in installed), "unknown")


def _matches_jaxlib(plugin: _Plugin) -> bool:
    """Returns whether the numbers of the plugin's version are those of jaxlib's.

    JAX refuses a plugin otherwise. A suffix after the numbers may differ.
    """
    numbers = (re.match(r"[\d.]*\d", v) for v in (plugin.version, _JAXLIB))
    found, wanted = (each and each[0] for each in numbers)
    return found is not None and found == wanted
