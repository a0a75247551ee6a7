"""The Python in the README and in docs/ runs, and prints what the pages say."""

import ast
import contextlib
import functools
import io
import re
import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

_ROOT = Path(__file__).parent.parent
_README = _ROOT / "README.md"
_PAGES = (_README, *sorted((_ROOT / "docs").glob("*.md")))

# A block of Python and, if it comes next, what it prints.
_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<printed>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)


@functools.cache
def _printed(page):
    """For each block, its line, what it printed, and what the page says it prints."""
    text = page.read_text()
    names = {"__name__": "__main__"}
    results = []
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        for block in _BLOCK.finditer(text):
            line = text.count("\n", 0, block.start("code"))
            # Lines of the page in tracebacks.
            code = compile("\n" * line + block["code"], page, "exec")
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(code, names)
            results.append((line, output.getvalue(), block["printed"]))
    return results


class DocsTest(parameterized.TestCase):
    @parameterized.named_parameters((page.name, page) for page in _PAGES)
    def test_code_runs_and_prints_what_the_page_says(self, page):
        blocks = _printed(page)
        self.assertNotEmpty(blocks)
        for line, printed, expected in blocks:
            with self.subTest(line=line):
                self.assertEqual(printed, printed if expected is None else expected)

    @parameterized.named_parameters((page.name, page) for page in _PAGES)
    def test_every_block_is_found(self, page):
        text = page.read_text()
        found = [block.groupdict() for block in _BLOCK.finditer(text)]
        self.assertLen(found, text.count("```python"))
        printed = [block for block in found if block["printed"] is not None]
        self.assertLen(printed, text.count("```text"))

    def test_readme_reports_the_memory_of_a_gpu(self):
        (report,) = [p for _, p, _ in _printed(_README) if p.startswith("['")]
        targets, temp_bytes = map(ast.literal_eval, report.splitlines())
        self.assertIn("h100", targets)
        self.assertGreater(temp_bytes, 0)

    def test_readme_names_the_versions_that_are_tested(self):
        pinned = (_ROOT / "constraints.txt").read_text()
        text = " ".join(_README.read_text().split())
        for python, marker in (("3.11", "<"), ("3.13", ">=")):
            versions = [
                re.search(rf'^{name}==(\S+); python_version {marker} "', pinned, re.M)[
                    1
                ]
                for name in ("jax", "flax")
            ]
            self.assertIn(
                "Python {} with JAX {} and Flax {}".format(python, *versions), text
            )


if __name__ == "__main__":
    absltest.main()
