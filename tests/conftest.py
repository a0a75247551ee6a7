"""Settings that must be made before JAX is imported; the tests that cannot run here."""

import os

from tests import xla_flags

# The tests are about results, which do not need a GPU; name one to test on it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices for the tests of meshes; all others use the first.
os.environ.setdefault("XLA_FLAGS", xla_flags.devices(8))

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

_NO_COMPILER = "needs XLA's GPU compiler"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest test first, for which one process would wait at the end."""
    items.sort(key=lambda item: "test_presets" not in item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skips a test that asks for the GPU compiler where there is none."""
    report = yield
    if call.excinfo is not None and _lacks_compiler(call.excinfo.value):
        report.outcome = "skipped"
        path, line, _ = item.location
        report.longrepr = (path, line or 0, f"{_NO_COMPILER}: {call.excinfo.value}")
    return report


def _lacks_compiler(error):
    """Whether that is the error, or what the error is about."""
    while error is not None:
        if type(error).__name__ == "CompilerMissingError":
            return True
        error = error.__cause__ or error.__context__
    return False


def pytest_terminal_summary(terminalreporter):
    """Says last, and loudly, how many tests did not run."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [str(report.longrepr[2]) for report in skipped]
    if count := sum(_NO_COMPILER in reason for reason in reasons):
        terminalreporter.section("NOT TESTED", red=True, bold=True)
        terminalreporter.line(
            f"{count} skipped: XLA's GPU compiler is not installed, and the memory of "
            "GPUs was not tested.",
            red=True,
        )
