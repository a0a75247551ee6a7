"""Rules of others, kernels, callbacks, effects, and mutable references."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import hijax, io_callback
from jax.experimental import pallas as pl

from dropit_jax import DropIT
from dropit_jax import dot_general as dropit_dot
from tests.dropit_jax.transform.features.network import mlp


@jax.custom_vjp
def _own_rule(x):
    return jnp.sin(x)


_own_rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * jnp.cos(x) * g,))


def custom_vjp(params, x):
    return mlp(params, _own_rule(x @ params["w"][0]))


def custom_vjp_in_scan(params, x):
    y, _ = lax.scan(lambda c, w: (_own_rule(c @ w), None), x, params["w"])
    return jnp.sum(y**2)


@jax.custom_jvp
def _own_tangent(x):
    return jnp.sin(x)


_own_tangent.defjvp(lambda p, t: (jnp.sin(p[0]), 2 * jnp.cos(p[0]) * t[0]))


def custom_jvp(params, x):
    return mlp(params, _own_tangent(x @ params["w"][0]))


def dropit_layer(params, x):
    numbers = (((1,), (0,)), ((), ()))
    y = dropit_dot(jnp.tanh(x), params["w"][0], numbers, dropit=DropIT(0.5))
    return mlp(params, y)


def debug_print(params, x):
    y = jnp.tanh(x @ params["w"][0])
    jax.debug.print("{}", y[0, 0], ordered=False)
    return jnp.sum(y**2)


def _in_a_kernel(function, *operands):
    def kernel(*refs):
        *given, made = refs
        made[...] = function(*(ref[...] for ref in given))

    shape = jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(*operands)


@jax.custom_vjp
def _sin_of_pallas(x):
    return _in_a_kernel(jnp.sin, x)


_sin_of_pallas.defvjp(
    lambda x: (_sin_of_pallas(x), x),
    lambda x, g: (_in_a_kernel(lambda x, g: jnp.cos(x) * g, x, g),),
)


def pallas_call(params, x):
    return jnp.sum(_sin_of_pallas(x @ params["w"][0]) @ params["w"][1] ** 2)


# JAX 0.12 calls it by its new name.
class Cube(getattr(hijax, "HiPrim", None) or hijax.VJPHiPrimitive):
    def __init__(self, aval):
        self.in_avals, self.out_aval, self.params = (aval,), aval, {}
        super().__init__()

    def expand(self, x):
        return x**3

    def vjp_fwd(self, nonzeros, x):
        return self(x), x

    def vjp_bwd_retval(self, x, g):
        return (3 * x**2 * g,)


def hijax_primitive(params, x):
    y = jnp.tanh(x @ params["w"][0])
    return jnp.sum(Cube(jax.typeof(y))(y) @ params["w"][1])


def mutable_reference(params, x):
    total = jax.new_ref(jnp.zeros_like(x))
    for w in params["w"]:
        x = jnp.tanh(x @ w)
        total[...] += jnp.sin(x)
    total[0] = total[1] ** 2
    return jnp.sum(total[...] ** 2)


def reference_in_scan(params, x):
    total = jax.new_ref(jnp.zeros_like(x))

    def turn(x, w):
        x = jnp.tanh(x @ w)
        total[...] += jnp.sin(x)
        return x, None

    y, _ = lax.scan(turn, x, params["w"])
    return jnp.sum(total[...] ** 2) + jnp.sum(y)


def reference_in_fori_loop(params, x):
    total = jax.new_ref(jnp.zeros_like(x))

    def turn(i, x):
        x = jnp.tanh(x @ params["w"][i])
        total[i] += jnp.sin(x[0])
        return x

    y = lax.fori_loop(0, 3, turn, x)
    return jnp.sum(total[...] ** 2) + jnp.sum(y)


def reference_in_cond(params, x):
    total = jax.new_ref(jnp.zeros_like(x))

    def add(y):
        total[...] += jnp.sin(y)
        return y

    y = lax.cond(x[0, 0] < 9, add, jnp.cos, jnp.tanh(x @ params["w"][0]))
    return jnp.sum(total[...] ** 2 @ params["w"][1]) + jnp.sum(y**2)


@jax.custom_jvp
def _sin_of_the_host(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(np.sin, shape, x, vmap_method="expand_dims")


_sin_of_the_host.defjvp(lambda p, t: (_sin_of_the_host(p[0]), jnp.cos(p[0]) * t[0]))


def pure_callback(params, x):
    return jnp.sum(_sin_of_the_host(x @ params["w"][0]) @ params["w"][1] ** 2)


def ordered_effects(params, x):
    y = jnp.tanh(x @ params["w"][0])
    jax.debug.callback(lambda _: None, y[0, 0], ordered=True)
    io_callback(lambda _: None, None, lax.stop_gradient(y[0, 1]), ordered=True)
    return jnp.sum(jnp.sin(y) @ params["w"][1])
