import atexit
import functools
import io
import json
import re
import shutil
import tempfile
from pathlib import Path

import PIL.Image
import rich.console
from absl.testing import absltest, parameterized

from configs import digits_resnet18
from dropit_jax import memory
from dropit_jax.memory.compiled import toolchain
from tests import xla_flags
from tests.train import commands
from train import compare
from train.config import config as config_lib
from train.reports import measurements

_TINY = (
    "--config=configs/digits_vit.py",
    "--config.batch_size=32",
    "--config.num_epochs=1",
)
# What is trained does not matter here: compiled in less time, as in other tests.
_QUICK = {"XLA_FLAGS": xla_flags.devices(1)}


@functools.cache
def _without_compiler():
    """The workdir of a comparison without a GPU compiler, and what the run returned."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    workdir = directory / "run"
    nowhere = {memory.COMPILER_PATH_VARIABLE: str(directory / "none")}
    arguments = (*_TINY, f"--workdir={workdir}")
    result = commands.run("train.compare", *arguments, variables=_QUICK | nowhere)
    return workdir, result


class CompareTest(parameterized.TestCase):
    def test_the_command_prints_the_table_and_writes_it_and_the_curves(self):
        toolchain.find()  # or this cannot be tested here
        trained, _ = _without_compiler()
        directory = Path(self.enterContext(tempfile.TemporaryDirectory())) / "run"
        shutil.copytree(trained, directory)
        for name in ("comparison.json", "curves.png"):
            (directory / name).unlink()
        arguments = (*_TINY, f"--workdir={directory}")
        status, out, errors = commands.run(
            "train.compare", *arguments, variables=_QUICK
        )
        self.assertEqual((status, errors), (0, ""))
        results = json.loads((directory / "comparison.json").read_text())
        flax, dropit = results["flax"], results["dropit"]
        self.assertLess(dropit["stored_bytes"], 0.4 * flax["stored_bytes"])
        for name, result in results.items():
            config = config_lib.from_json(
                (directory / name / "config.json").read_text()
            )
            expected = "baseline" if name == "flax" else "dropit"
            self.assertEqual(config.memory, expected)
            stored = measurements.stored_bytes(config)
            self.assertEqual(result["stored_bytes"], stored)
            self.assertGreater(result["temp_bytes"], 0)
            self.assertGreater(result["step_seconds"], 0)
            self.assertBetween(result["test_accuracy"], 0, 1)
        self.assertIn("temp bytes of a step on h100", out)
        self.assertNotIn("could not be measured", out)
        self.assertIn(f"{dropit['stored_bytes'] / flax['stored_bytes']:.2f}", out)
        with PIL.Image.open(directory / "curves.png") as figure:
            self.assertEqual(figure.format, "PNG")

    def test_what_cannot_be_measured_is_said_after_training(self):
        directory, (status, out, errors) = _without_compiler()
        self.assertEqual((status, errors), (0, ""))
        results = json.loads((directory / "comparison.json").read_text())
        for result in results.values():
            self.assertIsNone(result["temp_bytes"])
            self.assertGreater(result["test_accuracy"], 0)
        (reason,) = re.findall(r"^.*could not be measured.*$", out, re.MULTILINE)
        self.assertIn("The memory of a step on h100", reason)
        self.assertIn("XLA's GPU compiler is not installed", reason)
        self.assertIn("pip install", reason)
        self.assertNotIn("temp bytes", out)
        self.assertIn("time of a step here", out)

    def test_of_an_error_of_many_lines_the_last_says_why(self):
        error = memory.CompilerError("Compiling for h100 failed:\n  at line 3\nno file")
        self.assertEqual(compare._reason(error), "no file")
        self.assertEqual(compare._reason(KeyError()), "KeyError")

    def test_a_target_that_is_unknown_is_told_before_training(self):
        directory = Path(self.enterContext(tempfile.TemporaryDirectory())) / "run"
        arguments = (*_TINY, f"--workdir={directory}", "--target=h1000")
        status, _, errors = commands.run("train.compare", *arguments)
        self.assertEqual(status, 2)
        self.assertIn("Unknown target 'h1000'", errors)
        self.assertNotIn("Traceback", errors)
        self.assertFalse(directory.exists())

    @parameterized.parameters(
        ("baseline", "flax", "dropit"),
        ("lean", "flax", "lean"),
        ("baseline", "dropit", "baseline"),
    )
    def test_what_saves_no_memory_is_compared_with_dropit(
        self, memory, layers, expected
    ):
        config = digits_resnet18.get_config()
        config.memory, config.layers = memory, layers
        compared = compare._dropping(config)
        self.assertEqual((compared.memory, compared.layers), (expected, layers))

    def test_the_table_has_values_and_ratios(self):
        flax = compare.Measurements(0.8, 2**22, 2**23, 0.5)
        dropit = compare.Measurements(0.9, 2**20, 2**22, 0.75)
        console = rich.console.Console(file=io.StringIO(), width=120)
        console.print(compare.table({"flax": flax, "dropit": dropit}, "l4"))
        text = console.file.getvalue()
        rows = [
            [cell.strip() for cell in line.split("│")[1:-1]]
            for line in text.splitlines()
            if "│" in line
        ]
        self.assertEqual(
            rows,
            [
                ["test accuracy", "0.800", "0.900", "1.12"],
                ["stored for the backward pass, MiB", "4.0", "1.0", "0.25"],
                ["temp bytes of a step on l4, MiB", "8.0", "4.0", "0.50"],
                ["time of a step here, ms", "500", "750", "1.50"],
            ],
        )

    def test_a_ratio_to_nothing_is_not_written(self):
        flax = compare.Measurements(0.0, 2**22, 2**23, 0.5)
        console = rich.console.Console(file=io.StringIO(), width=120)
        console.print(compare.table({"flax": flax, "dropit": flax}, "l4"))
        self.assertRegex(console.file.getvalue(), r"0\.000 +│ 0\.000 +│ - ")


if __name__ == "__main__":
    absltest.main()
