"""Distances between gradients, and counts of primitives."""

import collections

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params


def error(found, expected):
    """Of all gradients as one vector, relative to the norm of the expected ones."""
    found, expected = (
        np.concatenate(
            [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
        )
        for tree in (found, expected)
    )
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def primitives(jaxpr):
    """How often each primitive stands in a program."""
    found = collections.Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        found[equation.primitive.name] += 1
        for inner in jaxprs_in_params(equation.params):
            found += primitives(inner)
    return found
