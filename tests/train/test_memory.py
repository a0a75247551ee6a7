import contextlib
import functools
import io
import json
from unittest import mock

import jax
import rich.console
from absl.testing import absltest, parameterized

from configs import digits_vit
from dropit_jax import memory
from tests.train import commands
from train import memory as command
from train.engine import step as step_lib
from train.reports import measurements

# A model of one block.
_TINY = ("--config=configs/digits_vit.py", "--config.batch_size=32", "--target=l4")


def _config():
    config = digits_vit.get_config()
    config.batch_size = 32
    return config


@functools.cache
def _report():
    """Returns the library's report on the step of plain Flax."""
    config = _config()
    config.memory = "baseline"
    step, args = step_lib.abstract(config)
    return memory.compile_report(step, *args, target="l4", donate=0)


def _flags(**values):
    return mock.patch.multiple(
        command, **{name: mock.Mock(value=value) for name, value in values.items()}
    )


def _shown(*tables):
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(*tables)
    return console.file.getvalue()


class CommandTest(parameterized.TestCase):
    def test_prints_what_a_preset_takes_beside_plain_flax(self):
        config, out = _config(), io.StringIO()
        config.memory = "lean"
        report = _report()
        with (
            _flags(_TARGET="l4", _MAX_BATCH=False, _JSON=False),
            mock.patch.object(measurements, "allocated", return_value=report) as asked,
            contextlib.redirect_stdout(out),
            mock.patch.dict("os.environ", COLUMNS="200"),
        ):
            command.main(config, None)
        compiled = [(call.args[0].memory, call.args[1]) for call in asked.mock_calls]
        self.assertEqual(compiled, [("baseline", "l4"), ("lean", "l4")])
        out = out.getvalue()
        for text in ("32 images on l4", "baseline", "temporaries", "the peak of lean"):
            self.assertIn(text, out)
        self.assertRegex(out, r"MlpBlock_3/Dense_1 +│ dot_general +│ backward")

    def test_json_is_what_the_library_reports(self):
        arguments = (*_TINY, "--config.memory=baseline", "--json")
        status, out, errors = commands.run("train.memory", *arguments)
        self.assertEqual((status, errors), (0, ""))
        printed = json.loads(out)
        report = _report()
        self.assertEqual(set(printed), {"baseline"})
        self.assertEqual(printed["baseline"]["temp_bytes"], report.temp_bytes)
        self.assertEqual(printed["baseline"]["peak_bytes"], report.peak_bytes)
        self.assertEqual(printed["baseline"]["flops"], report.flops)

    @parameterized.parameters(
        (("--target=h1000",), "error: Unknown target 'h1000'"),
        (("--workdir=runs/x",), "leave out --workdir"),
    )
    def test_errors_are_a_line(self, arguments, message):
        status, out, errors = commands.run("train.memory", *_TINY, *arguments)
        self.assertNotEqual(status, 0)
        self.assertIn(message, errors + out)
        self.assertNotIn("Traceback", errors)


class NameTest(parameterized.TestCase):
    @parameterized.parameters(
        ("baseline", "flax", "none", "baseline"),
        ("lean", "flax", "blocks", "lean+remat_blocks"),
        ("baseline", "dropit", "none", "baseline+dropit_layers"),
        ("exact", "dropit", "dots", "exact+dropit_layers+remat_dots"),
    )
    def test_says_all_that_saves_memory(self, preset, layers, remat, expected):
        config = _config()
        config.memory, config.layers, config.remat = preset, layers, remat
        self.assertEqual(command.name_of(config), expected)


class LargestBatchTest(parameterized.TestCase):
    def test_is_searched_beyond_the_dataset(self):
        report = memory.CompileReport("l4", *[0] * 4, 0, 0, ())
        found = memory.BatchPlan(3, report, 2**30)
        with mock.patch.object(memory, "max_batch", return_value=found) as search:
            self.assertEqual(command.plan(_config(), "a5000"), found)
        make_step, target = search.call_args.args
        self.assertEqual(target, "a5000")
        _, (_, batch), donate = make_step(10_000)
        self.assertEqual(batch["image"].shape, (10_000, 8, 8, 1))
        self.assertEqual(donate, 0)

    def test_of_accumulated_steps_it_is_a_multiple(self):
        config, report = _config(), memory.CompileReport("l4", *[0] * 4, 0, 0, ())
        config.accumulate_steps = 4
        found = memory.BatchPlan(3, report, 2**30)
        with mock.patch.object(memory, "max_batch", return_value=found) as search:
            self.assertEqual(command.plan(config, "l4").batch, 12)
        step, args, _ = search.call_args.args[0](3)
        jax.eval_shape(step, *args)  # three examples in each of four parts

    def test_is_shown_and_in_the_json(self):
        report = memory.CompileReport("l4", 2**22, 2**20, 2**20, 2**20, 3e9, 0, ())
        plan = memory.BatchPlan(1234, report, 2**30)
        text = _shown(command.table(32, {"lean": report}, {"lean": plan}))
        rows = {
            cells[1].strip(): cells[2].strip()
            for line in text.splitlines()
            if len(cells := line.split("│")) > 3
        }
        self.assertEqual(rows["temporaries, MiB"], "4.0")
        self.assertEqual(rows["results beside them, MiB"], "0.0")
        self.assertEqual(rows["all, MiB"], "5.0")
        self.assertEqual(rows["largest batch"], "1,234")
        found = command.as_dict({"lean": report}, {"lean": plan})["lean"]
        self.assertEqual(found["max_batch"], 1234)
        self.assertIn(
            "none", _shown(command.table(32, {"lean": report}, {"lean": None}))
        )

    def test_where_nothing_fits_there_is_none(self):
        error = memory.NoBatchFitsError("nothing fits")
        with mock.patch.object(memory, "max_batch", side_effect=error):
            self.assertIsNone(command.plan(_config(), "a5000"))


if __name__ == "__main__":
    absltest.main()
