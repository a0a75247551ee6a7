"""Settings that must be made before JAX is imported."""

import os
from pathlib import Path

from tests import xla_flags

# The tests are about results, which do not need a GPU; name one to test on it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices for the tests of meshes; all others use the first.
os.environ.setdefault("XLA_FLAGS", xla_flags.devices(8))
# Where the Makefile puts the GPU compiler.
_COMPILER = Path(__file__).parents[1] / ".venv" / "gpu-compiler"
if _COMPILER.is_dir():
    os.environ.setdefault("DROPIT_GPU_COMPILER", str(_COMPILER))

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Every call of these has its shapes and dtypes checked against the annotations. (Not
# `ops`: JAX's transformations call it with array types of their own.)
install_import_hook(
    [f"dropit_jax.{name}" for name in ("chunking", "nn", "packing", "selection")],
    "beartype.beartype",
)

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest test first, for which one process would wait at the end."""
    items.sort(key=lambda item: "test_presets" not in item.nodeid)
