"""The GPU compiler is found where it was installed, and compiles with its own CUDA."""

import os
import shlex
import stat
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import memory
from dropit_jax.memory.compiled import toolchain

_JAXLIB = metadata.version("jaxlib")
_CUDA12 = ("nvidia", "cuda_nvcc")
_CUDA13 = ("nvidia", "cu13")


def _install(root, plugin=None, version=_JAXLIB, cuda=None):
    """Puts files of these names into a directory, as pip would."""
    if plugin is not None:
        (root / plugin).mkdir(parents=True)
        info = root / f"{plugin}-{version}.dist-info"
        info.mkdir()
        name = plugin.replace("_", "-")
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    if cuda is not None:
        for file in (("bin", "ptxas"), ("nvvm", "libdevice", "libdevice.10.bc")):
            path = root.joinpath(*cuda, *file)
            path.parent.mkdir(parents=True)
            path.touch()


class FindTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.prefix, self.user = self.root / "env", self.root / "user"
        self.packages = self.root / "packages"
        for directory in (self.prefix, self.user, self.packages):
            directory.mkdir()
        self.enterContext(mock.patch.object(sys, "prefix", str(self.prefix)))
        self.enterContext(mock.patch.object(sys, "path", [str(self.packages)]))
        self.enterContext(
            mock.patch.object(
                toolchain.site, "getuserbase", return_value=str(self.user)
            )
        )
        self.enterContext(mock.patch.dict(os.environ))
        os.environ.pop(memory.COMPILER_PATH_VARIABLE, None)

    @parameterized.parameters("prefix", "user")
    def test_beside_the_environment_comes_before_what_is_in_it(self, where):
        beside = getattr(self, where) / "gpu-compiler"
        for root in (beside, self.packages):
            _install(root, "jax_cuda12_plugin", cuda=_CUDA12)
        found = toolchain.find()
        self.assertEqual(found.plugin, beside)
        self.assertEqual(found.cuda, beside.joinpath(*_CUDA12))

    @parameterized.parameters(
        ("jax_cuda12_plugin", _CUDA12), ("jax_cuda13_plugin", _CUDA13)
    )
    def test_in_the_environment(self, plugin, cuda):
        _install(self.packages, plugin, cuda=cuda)
        self.assertEqual(toolchain.find().cuda, self.packages.joinpath(*cuda))

    def test_the_files_of_cuda_may_lie_elsewhere(self):
        _install(self.packages, "jax_cuda12_plugin")
        _install(self.prefix / "gpu-compiler", cuda=_CUDA12)
        found = toolchain.find()
        self.assertEqual(found.plugin, self.packages)
        self.assertEqual(found.cuda, self.prefix.joinpath("gpu-compiler", *_CUDA12))

    def test_one_that_fits_comes_before_one_that_does_not(self):
        _install(self.prefix / "gpu-compiler", "jax_cuda12_plugin", "0.4.30")
        _install(self.packages, "jax_cuda13_plugin", f"{_JAXLIB}.post1", _CUDA13)
        self.assertEqual(toolchain.find().plugin, self.packages)

    def test_the_variable_names_the_only_place(self):
        _install(self.packages, "jax_cuda12_plugin", cuda=_CUDA12)
        other = self.root / "with space"
        os.environ[memory.COMPILER_PATH_VARIABLE] = str(other)
        self.assertIn(f"--target {shlex.quote(str(other))} ", self._error())
        _install(other, "jax_cuda12_plugin", cuda=_CUDA12)
        self.assertEqual(toolchain.find().plugin, other)

    def test_without_a_plugin_the_error_installs_everything(self):
        error = self._error()
        self.assertIn("is not installed", error)
        self.assertIn(f"jax-cuda12-plugin=={_JAXLIB} nvidia-cuda-nvcc-cu12", error)
        self.assertIn(f"--target {self.prefix}/gpu-compiler ", error)

    def test_the_command_writes_where_one_may(self):
        with mock.patch.object(os, "access", lambda path, _: path != str(self.prefix)):
            self.assertIn(f"--target {self.user}/gpu-compiler ", self._error())

    @parameterized.parameters(
        ("jax_cuda12_plugin", "nvidia-cuda-nvcc-cu12"),
        ("jax_cuda13_plugin", "nvidia-cuda-nvcc nvidia-nvvm"),
    )
    def test_without_the_files_of_cuda_it_installs_these(self, plugin, packages):
        _install(self.packages, plugin)
        error = self._error()
        self.assertIn(f"in {self.packages} lacks NVIDIA's ptxas and libdevice", error)
        self.assertEndsWith(error, f" {packages}")
        self.assertNotIn("plugin==", error)

    def test_a_plugin_of_another_version_is_named(self):
        _install(self.packages, "jax_cuda12_plugin", "0.4.30", _CUDA12)
        error = self._error()
        self.assertIn(f"is of JAX 0.4.30, and this is JAX {_JAXLIB}", error)
        self.assertIn(f"jax-cuda12-plugin=={_JAXLIB}", error)

    def _error(self):
        with pytest.raises(memory.CompilerMissingError) as raised:
            toolchain.find()
        self.assertLen(str(raised.value).splitlines(), 1)
        return str(raised.value)


class OtherCudaTest(parameterized.TestCase):
    """A CUDA on this machine changes no figure."""

    def test_one_that_is_useless_is_not_seen(self):
        def function(x, w):
            # With an exponential, which is in libdevice, and a product.
            return jnp.exp(x) @ w

        x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
        expected = memory.compile_report(function, x, x, target="h100")
        root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        _install(root, cuda=())
        (root / "libdevice.10.bc").touch()
        for name in ("ptxas", "nvlink", "nvcc", "fatbinary"):
            program = root / "bin" / name
            program.write_text("#!/bin/sh\nexit 1\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        useless = {
            "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "CUDA_ROOT": str(root),
            "CUDA_HOME": str(root),
            "CUDA_PATH": str(root),
            "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={root}",
        }
        before = Path.cwd()
        self.addCleanup(os.chdir, before)
        os.chdir(root)  # XLA looks here too
        with mock.patch.dict(os.environ, useless):
            actual = memory.compile_report(function, x, x, target="h100")
        self.assertEqual(actual, expected)


if __name__ == "__main__":
    absltest.main()
