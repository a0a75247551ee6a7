"""Commands, which share flags, beside one another in one process."""

import importlib
import pkgutil

from absl.testing import absltest, parameterized

import benchmarks
import train


class CommandsTest(parameterized.TestCase):
    @parameterized.parameters(train, benchmarks)
    def test_every_module_can_be_imported_beside_the_others(self, package):
        # absl refuses a flag that two modules define.
        names = [each.name for each in pkgutil.iter_modules(package.__path__)]
        self.assertContainsSubset(["memory"], names)
        for name in names:
            importlib.import_module(f"{package.__name__}.{name}")


if __name__ == "__main__":
    absltest.main()
