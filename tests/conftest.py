"""Settings from before the import of JAX, and the skips of tests without a compiler."""

import os

from tests import xla_flags

# The tests check results, which need no GPU; set the variable to test on one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests of meshes use eight devices; all others use the first.
os.environ.setdefault("XLA_FLAGS", xla_flags.devices(8))

import hypothesis
import pytest
from jaxtyping import install_import_hook

# In these modules, shapes and dtypes are checked against the annotations in each call.
# (Not in `products`: JAX's transformations call it with array types of their own.)
install_import_hook(
    [
        "dropit_jax.nn",
        "dropit_jax.storage.chunking",
        "dropit_jax.storage.packing",
        "dropit_jax.storage.selection.elements",
    ],
    "beartype.beartype",
)

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("default")

_NO_COMPILER = "needs XLA's GPU compiler"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest tests first, so that no process runs them alone at the end."""
    items.sort(key=lambda item: "test_presets" not in item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Reports a test as skipped that fails because there is no GPU compiler."""
    report = yield
    if call.excinfo is not None and _lacks_compiler(call.excinfo.value):
        report.outcome = "skipped"
        path, line, _ = item.location
        report.longrepr = (path, line or 0, f"{_NO_COMPILER}: {call.excinfo.value}")
    return report


def _lacks_compiler(error):
    """Returns whether the error, or one that caused it, is `CompilerMissingError`."""
    while error is not None:
        if type(error).__name__ == "CompilerMissingError":
            return True
        error = error.__cause__ or error.__context__
    return False


def pytest_terminal_summary(terminalreporter):
    """Prints how many tests were skipped, at the end and in red."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [str(report.longrepr[2]) for report in skipped]
    if count := sum(_NO_COMPILER in reason for reason in reasons):
        terminalreporter.section("NOT TESTED", red=True, bold=True)
        terminalreporter.line(
            f"{count} skipped: XLA's GPU compiler is not installed, and the memory of "
            "GPUs was not tested.",
            red=True,
        )
