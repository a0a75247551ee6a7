"""Functions of (params, x), one for each feature of JAX that `drop` meets."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import hijax, io_callback
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dropit_jax import DropIT
from dropit_jax import dot_general as dropit_dot

_RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(_RNG.normal(size=(3, 16, 16)) / 4, jnp.float32),
    "b": jnp.asarray(_RNG.normal(size=(3, 16)) / 4, jnp.float32),
}
X = jnp.asarray(_RNG.normal(size=(8, 16)), jnp.float32)


def _layer(x, w, b):
    return jnp.tanh(x @ w + b)


def mlp(params, x):
    for w, b in zip(params["w"], params["b"], strict=True):
        x = _layer(x, w, b)
    return jnp.sum(x**2)


def jit(params, x):
    return mlp(params, jax.jit(jax.nn.gelu)(x))


def softmax(params, x):
    x = jax.nn.softmax(x @ params["w"][0])
    return jnp.sum(jax.nn.log_softmax(x @ params["w"][1])[:, 0])


def masked_softmax(params, x):
    scores = jnp.where(jnp.tril(jnp.ones((8, 16), bool)), x @ params["w"][0], -1e9)
    return jnp.sum(jax.nn.softmax(scores) @ params["w"][1] ** 2)


def gated(params, x):
    gate, value = (x @ params["w"][i] for i in (0, 1))
    return jnp.sum((jax.nn.silu(gate) * value) @ params["w"][2])


def scan(params, x):
    def turn(x, slices):
        y = _layer(x, slices["w"], slices["b"])
        return y, jnp.sum(y**2)

    y, sums = lax.scan(turn, x, params)
    return jnp.sum(y) + jnp.sum(sums)


def scan_reversed(params, x):
    y, ys = lax.scan(
        lambda c, p: (_layer(c, p["w"], p["b"]), c), x, params, reverse=True
    )
    return jnp.sum(jnp.sin(y)) + jnp.sum(ys**2)


def scan_unrolled(params, x):
    y, _ = lax.scan(lambda c, p: (_layer(c, p["w"], p["b"]), None), x, params, unroll=2)
    return jnp.sum(y**2)


def scan_of_constants(params, x):
    w = params["w"][0]
    y, _ = lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)
    return jnp.sum(y**2)


def scan_of_norms(params, x):
    def turn(x, w):
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x).mean(-1, keepdims=True) - mean**2
        return jnp.tanh((x - mean) * lax.rsqrt(variance + 1e-6) @ w), None

    y, _ = lax.scan(turn, x, params["w"])
    return jnp.sum(y**2)


def scan_of_an_unused_carry(params, x):
    w = params["w"][0]

    def turn(carry, _):
        x, _ = carry
        return (jnp.tanh(x @ w), jnp.mean(x**2)), jnp.mean(jnp.sin(x))

    _, means = lax.scan(turn, (x, 0.0), None, length=2)
    return jnp.sum(means)


def scan_nested(params, x):
    def outer(x, _):
        y, _ = lax.scan(lambda c, w: (jnp.sin(c @ w), None), x, params["w"])
        return y, jnp.sum(y)

    y, sums = lax.scan(outer, x, None, length=2)
    return jnp.sum(y**2) + jnp.sum(sums)


def scan_of_checkpointed(params, x):
    block = jax.checkpoint(lambda c, p: (_layer(c, p["w"], p["b"]), None))
    y, _ = lax.scan(block, x, params)
    return jnp.sum(y**2)


def cond(params, x):
    w = params["w"][0]
    y = lax.cond(x[0, 0] > 0, lambda x: jnp.sin(x @ w), lambda x: x @ w, x)
    return jnp.sum(y**2)


def switch(params, x):
    w = params["w"][0]
    branches = [lambda x: x @ w, jnp.sin, lambda x: jnp.tanh(x) * 2]
    return jnp.sum(lax.switch(jnp.int32(x[0, 0] * 10), branches, x) ** 2)


def fori_loop(params, x):
    def turn(i, x):
        return jnp.tanh(x @ params["w"][i])

    return jnp.sum(lax.fori_loop(0, 3, turn, x) ** 2)


def while_loop(params, x):
    count = lax.while_loop(lambda n: n < 4, lambda n: n + 1, 0)
    return mlp(params, x) * count


def checkpointed(params, x):
    return jax.checkpoint(mlp)(params, jnp.sin(x))


def checkpointed_with_policy(params, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(mlp, policy=policy)(params, jnp.sin(x))


def checkpointed_blocks(params, x):
    for w, b in zip(params["w"], params["b"], strict=True):
        x = jax.checkpoint(_layer)(x, w, b)
    return jnp.sum(x**2)


@jax.custom_vjp
def _own_rule(x):
    return jnp.sin(x)


_own_rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * jnp.cos(x) * g,))


def custom_vjp(params, x):
    return mlp(params, _own_rule(x @ params["w"][0]))


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


def vmap(params, x):
    return jnp.sum(jax.vmap(lambda row: jnp.tanh(row @ params["w"][0]))(x) ** 2)


def lax_map(params, x):
    return jnp.sum(lax.map(lambda row: jnp.tanh(row @ params["w"][0]), x) ** 2)


def associative_scan(params, x):
    y = lax.associative_scan(jnp.multiply, 1 + 0.1 * jnp.tanh(x @ params["w"][0]))
    return jnp.sum(y**2)


def named(params, x):
    with jax.named_scope("block"):
        y = checkpoint_name(jnp.tanh(x @ params["w"][0]), "hidden")
    return jnp.sum(jnp.sin(y @ params["w"][1]))


def stopped(params, x):
    y = jnp.tanh(x @ params["w"][0])
    return jnp.sum(y * lax.stop_gradient(jnp.sin(y)))


def debug_print(params, x):
    y = jnp.tanh(x @ params["w"][0])
    jax.debug.print("{}", y[0, 0], ordered=False)
    return jnp.sum(y**2)


def integers(params, x):
    order = jnp.argsort(x[:, 0])
    y = jnp.tanh(x[order] @ params["w"][0])
    kept = jnp.where(y > 0, y, 0.1 * y)
    return jnp.sum(kept[jnp.arange(8), jnp.argmax(y, axis=1)] ** 2)


def complex_values(params, x):
    y = jnp.fft.fft(x @ params["w"][0])
    return jnp.sum(jnp.abs(y * jnp.exp(1j * x)) ** 2)


def empty_and_scalar(params, x):
    nothing = jnp.sin(x[:0] @ params["w"][0])
    return jnp.sum(nothing) + jnp.tanh(jnp.sum(x @ params["w"][1]))


def typed_key(params, x):
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
    return jnp.sum(jnp.where(kept, jnp.tanh(x @ params["w"][0]), 0) ** 2)


def raw_key(params, x):
    noise = jax.random.normal(jax.random.PRNGKey(0), x.shape)
    return jnp.sum(jnp.tanh(x @ params["w"][0] + noise) ** 2)


def tied(params, x):
    w = params["w"][0]
    return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w.T) ** 2)


def pooled(params, x):
    y = (x @ params["w"][0]).reshape(2, 4, 4, 4)
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    return jnp.sum(jnp.sin(y))


def convolved(params, x):
    kernel = params["w"].reshape(-1)[: 9 * 4 * 4].reshape(3, 3, 4, 4)
    y = x.reshape(2, 4, 4, 4)
    for _ in range(2):
        y = lax.conv_general_dilated(
            jnp.tanh(y),
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = (y - y.mean((0, 1, 2))) * lax.rsqrt(y.var((0, 1, 2)) + 1e-5)
    return jnp.sum(y**3)


def switch_in_scan(params, x):
    def turn(x, slices):
        which, w = slices
        branches = [lambda x: jnp.sin(x @ w), jnp.cos, lambda x: jnp.tanh(x) @ w]
        return lax.switch(which, branches, x), None

    y, _ = lax.scan(turn, x, (jnp.arange(3), params["w"]))
    return jnp.sum(y**2)


def cond_in_scan(params, x):
    def turn(x, w):
        y = lax.cond(jnp.sum(x) > 0, lambda x: jnp.sin(x @ w), jnp.cos, x)
        return y, jnp.sum(y)

    y, sums = lax.scan(turn, x, params["w"])
    return jnp.sum(y**2) + jnp.sum(sums)


def checkpointed_scan(params, x):
    @jax.checkpoint
    def blocks(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    return jnp.sum(blocks(jnp.sin(x), params["w"]) ** 2)


def vmapped_scan(params, x):
    def of_row(row):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), row, params["w"])[0]

    return jnp.sum(jax.vmap(of_row)(x) ** 2)


def custom_vjp_in_scan(params, x):
    y, _ = lax.scan(lambda c, w: (_own_rule(c @ w), None), x, params["w"])
    return jnp.sum(y**2)


def scan_in_checkpoint_in_scan(params, x):
    @jax.checkpoint
    def block(x, _):
        y, _ = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["w"])
        return y, jnp.sum(y)

    y, sums = lax.scan(block, x, None, length=2)
    return jnp.sum(y**2) + jnp.sum(sums)


def offloaded(params, x):
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["hidden"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def block(x, w):
        return jnp.sin(jnp.tanh(checkpoint_name(x @ w, "hidden")))

    for w in params["w"]:
        x = jax.checkpoint(block, policy=policy)(x, w)
    return jnp.sum(x**2)


def order_statistics(params, x):
    y = x @ params["w"][0]
    y = y * jnp.median(y, axis=-1, keepdims=True) + lax.top_k(y, 1)[0]
    return jnp.sum(jnp.sin(y @ params["w"][1]))


def linear_algebra(params, x):
    y = jnp.tanh(x @ params["w"][0])
    solved = jnp.linalg.solve(y @ y.T + jnp.eye(8), y)
    return jnp.sum(jnp.sin(solved @ params["w"][1]))


def sharded(params, x):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))

    def of_rows(w, rows):
        y = jnp.tanh(rows @ w)
        return y / (1 + lax.psum(jnp.sum(y**2), "rows"))

    rows = P("rows")
    function = jax.shard_map(of_rows, mesh=mesh, in_specs=(P(), rows), out_specs=rows)
    return jnp.sum(function(params["w"][0], jnp.sin(x)) ** 2)


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
class _Cube(getattr(hijax, "HiPrim", None) or hijax.VJPHiPrimitive):
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
    return jnp.sum(_Cube(jax.typeof(y))(y) @ params["w"][1])


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


FEATURES = {
    name: value
    for name, value in list(globals().items())
    if not name.startswith("_")
    and callable(value)
    and getattr(value, "__module__", "") == __name__
}
