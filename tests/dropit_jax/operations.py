"""Every public operation beside the plain one that it takes the place of."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as flax_nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import dropit_jax
from dropit_jax import DropIT, linen, nn

_PRODUCT = (((1,), (0,)), ((), ()))
_LAYOUT = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Operation:
    """Two functions of arrays.

    Attributes:
      own: ours.
      plain: JAX's or Flax's.
      shapes: of the arrays.
    """

    own: Callable[..., jax.Array]
    plain: Callable[..., jax.Array]
    shapes: tuple[tuple[int, ...], ...]

    def arguments(self, dtype) -> list[jax.Array]:
        """Random arrays."""
        rng = np.random.default_rng(0)
        return [jnp.asarray(rng.normal(size=shape), dtype) for shape in self.shapes]


def _activations():
    plain = {"tanh": jnp.tanh, "swish": jax.nn.silu}
    names = "gelu leaky_relu relu relu6 sigmoid silu swish tanh"
    for name in names.split():
        own, other = getattr(nn, name), plain.get(name) or getattr(jax.nn, name)
        yield name, Operation(own, other, ((8, 64),))


_POLICIES = {
    "indices": DropIT(0.5),
    "bitmap": DropIT(0.5, chunk_size=64),
    "random": DropIT(0.5, "random"),
    "channels": DropIT(0.5, granularity="channel"),
    "mean": DropIT(0.5, fill="mean"),
    "int8": DropIT(0.5, value_dtype="int8"),
    "int4": DropIT(0.0, value_dtype="int4"),
}


def _products():
    def product(x, w):
        return lax.dot_general(x, w, _PRODUCT)

    def conv(function, x, w, **options):
        return function(x, w, (1, 1), "SAME", dimension_numbers=_LAYOUT, **options)

    for name, policy in _POLICIES.items():
        options = {"dropit": policy}
        if policy.needs_key:
            options["key"] = jax.random.key(0)
        if policy.fill != "mean":  # which is of positions
            own = functools.partial(
                dropit_jax.dot_general, dimension_numbers=_PRODUCT, **options
            )
            yield f"dot_general_{name}", Operation(own, product, ((8, 64), (64, 16)))
        yield (
            f"conv_{name}",
            Operation(
                functools.partial(conv, dropit_jax.conv_general_dilated, **options),
                functools.partial(conv, lax.conv_general_dilated),
                ((2, 4, 4, 16), (3, 3, 16, 8)),
            ),
        )


def _layers():
    x = (4, 6, 32)
    for name, shape, fields, own in (
        ("Dense", x, {"features": 16}, {"dropit": DropIT(0.5)}),
        (
            "ConvTranspose",
            (2, 4, 4, 16),
            {"features": 8, "kernel_size": (3, 3)},
            {"dropit": DropIT(0.5, "random")},
        ),
        (
            "MultiHeadDotProductAttention",
            x,
            {"num_heads": 2},
            {"dropit": DropIT(0.5)},
        ),
    ):
        plain = getattr(flax_nn, name)(**fields)
        layer = getattr(linen, name)(**fields, **own)
        variables = plain.init(jax.random.key(0), np.zeros(shape, np.float32))
        yield (
            name,
            Operation(_applied(layer, variables), _applied(plain, variables), (shape,)),
        )


def _applied(module, variables):
    def apply(x):
        given = jax.tree.map(lambda array: array.astype(x.dtype), variables)
        return module.apply(given, x, rngs={"dropit": jax.random.key(1)})

    return apply


OPERATIONS = {
    name: operation
    for make in (_activations, _products, _layers)
    for name, operation in make()
}
