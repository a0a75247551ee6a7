"""The Python in the README is what it says: it runs."""

import re
from pathlib import Path

from absl.testing import absltest

_README = Path(__file__).parent.parent / "README.md"


class ReadmeTest(absltest.TestCase):
    def test_code_runs_top_to_bottom(self):
        blocks = re.findall(r"```python\n(.*?)```", _README.read_text(), re.DOTALL)
        self.assertNotEmpty(blocks)
        names = {"print": lambda *args: printed.append(args)}
        printed = []
        for block in blocks:
            exec(compile(block, str(_README), "exec"), names)
        targets, temp_bytes = printed[0][0], printed[1][0]
        self.assertIn("h100", targets)
        self.assertGreater(temp_bytes, 0)


if __name__ == "__main__":
    absltest.main()
