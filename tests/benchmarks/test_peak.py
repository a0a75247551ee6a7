import contextlib
import io
import types

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from benchmarks import peak
from dropit_jax import memory


def _step(w, x):
    """Two arrays of sines are alive at once, and nothing else that is large."""
    first, second = jnp.sin(x @ w), jnp.sin(x @ (w + 1))
    return (first @ second.T).sum()


_ARGUMENTS = (
    jax.ShapeDtypeStruct((256, 256), jnp.float32),
    jax.ShapeDtypeStruct((1024, 256), jnp.float32),
)
_WORKLOAD = types.SimpleNamespace(
    name="sines",
    variants={"plain": None},
    training_step=lambda variant: (_step, _ARGUMENTS, ()),
    title=lambda where: f"### Sines, {where}",
)


class PeakTest(parameterized.TestCase):
    def test_rows_are_groups_of_the_buffers(self):
        rows = peak.measure(_WORKLOAD, "plain", "h100", 100)
        report = memory.compile_report(
            _step, *_ARGUMENTS, target="h100", num_buffers=100
        )
        self.assertEqual(sum(r.buffers for r in rows), len(report.buffers))
        self.assertEqual(
            sum(r.nbytes for r in rows), sum(b.nbytes for b in report.buffers)
        )
        self.assertEqual(rows, sorted(rows, key=lambda row: -row.nbytes))
        for row in rows:
            self.assertEqual(row.share, row.nbytes / report.temp_bytes)
        self.assertEqual(peak.measure(_WORKLOAD, "plain", "h100", 1), rows[:1])

    def test_the_table_has_a_line_for_each(self):
        rows = peak.measure(_WORKLOAD, "plain", "h100", 2)
        text = peak.markdown(_WORKLOAD, rows)
        self.assertIn("Sines, h100, plain", text)
        self.assertLen(text.splitlines(), 4 + len(rows))
        self.assertIn(f"| {rows[0].type} | {rows[0].operation} |", text)

    @parameterized.parameters("--model=none", "--variants=none", "--target=none")
    def test_bad_flags_are_named(self, flag):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), pytest.raises(SystemExit):
            peak.main([flag])
        self.assertIn("none", errors.getvalue())


if __name__ == "__main__":
    absltest.main()
