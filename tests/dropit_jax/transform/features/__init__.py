"""Functions of (params, x), one for each feature of JAX that `drop` meets."""

import inspect

from tests.dropit_jax.transform.features import loops, plain, rules
from tests.dropit_jax.transform.features.arguments import PARAMS, X
from tests.dropit_jax.transform.features.network import mlp

__all__ = ["FEATURES", "PARAMS", "X"]

FEATURES = {"mlp": mlp} | {
    name: function
    for module in (plain, loops, rules)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}
