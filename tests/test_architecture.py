"""The arrows between modules: each folder imports only the ones named before it."""

import ast
from pathlib import Path

from absl.testing import absltest, parameterized

_ROOT = Path(__file__).parents[1]

# From the bottom up: a module imports those of its own layer and of the ones before.
_LAYERS = {
    "dropit_jax": (
        {"compat", "derivatives", "policy"},
        {"xla"},
        {"storage"},
        {"products"},
        {"memory"},
        {"nn", "transform"},
        {"linen", "nnx"},
        {"__init__"},
    ),
    "dropit_jax.transform": (
        {"tracing"},
        {"forms"},
        {"planning"},
        {"passes", "plan", "table"},
        {"differentiate"},
        {"drop"},
        {"__init__"},
    ),
    "dropit_jax.memory": ({"traced"}, {"compiled"}, {"__init__"}),
    "train": (
        {"system"},
        {"data", "models"},
        {"config"},
        {"processes", "weights"},
        {"engine"},
        {"runs"},
        {"reports"},
        {"cli"},
        {"loop"},
        {"ablation", "compare", "evaluate", "export", "main", "memory", "prepare"},
        {"report"},
        {"__init__"},
    ),
    "dropit_jax.storage": (
        {"dtypes", "shapes"},
        {"chunking", "last_axis"},
        {"packing"},
        {"selection"},
        {"kernels"},
        {"element_codes", "encodings", "quantization"},
        {"residual"},
        {"__init__"},
    ),
}
_MOST_FILES = 12


def _modules(package):
    folder = _ROOT / package.replace(".", "/")
    for path in sorted(folder.rglob("*.py")):
        yield path, ".".join(path.relative_to(folder).with_suffix("").parts)


def _imported(path, package):
    """Yields the modules of a package that a file imports, relative to the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith(f"{package}."):
                yield name.removeprefix(f"{package}.")


class ArrowsTest(parameterized.TestCase):
    @parameterized.parameters(*_LAYERS)
    def test_they_point_down(self, package):
        layer_of = {
            name: number
            for number, names in enumerate(_LAYERS[package])
            for name in names
        }
        wrong = []
        for path, module in _modules(package):
            own = module.partition(".")[0]
            self.assertIn(own, layer_of, f"{package}.{module} has no layer")
            for name in _imported(path, package):
                other = name.partition(".")[0]
                if other in layer_of and layer_of[other] > layer_of[own]:
                    wrong.append(f"{package}.{module} imports {package}.{name}")
        self.assertEmpty(wrong)

    def test_the_library_knows_no_program(self):
        for path, module in _modules("dropit_jax"):
            for package in ("train", "benchmarks", "configs"):
                self.assertEmpty(list(_imported(path, package)), module)

    @parameterized.parameters("train", "benchmarks", "configs")
    def test_programs_use_public_names(self, package):
        public = {"", *_public_modules()}
        for path, module in _modules(package):
            for name in _imported(path, "dropit_jax"):
                where = name.rpartition(".")[0]
                self.assertIn(where, public, f"{package}.{module} imports {name}")

    @parameterized.parameters("dropit_jax", "train", "benchmarks")
    def test_folders_are_small(self, package):
        folders = {path.parent for path, _ in _modules(package)}
        for folder in folders:
            files = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
            self.assertLessEqual(len(files), _MOST_FILES, str(folder))


def _public_modules():
    return ("linen", "memory", "nn", "nnx")


if __name__ == "__main__":
    absltest.main()
