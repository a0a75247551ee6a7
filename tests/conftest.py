"""Settings that must be made before JAX is imported."""

import os

# The tests are about results, which do not need a GPU; name one to test on it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
from jaxtyping import install_import_hook

# Every call of these in a test has its shapes and dtypes checked against the annotations.
install_import_hook(
    [
        f"dropit_jax.{name}"
        for name in ("chunking", "nn", "ops", "packing", "selection")
    ],
    "beartype.beartype",
)

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("default")
