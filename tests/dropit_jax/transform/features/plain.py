"""Arrays and operations: no loops, and no rules but JAX's."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.dropit_jax.transform.features.network import mlp


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


def vmap(params, x):
    return jnp.sum(jax.vmap(lambda row: jnp.tanh(row @ params["w"][0]))(x) ** 2)


def named(params, x):
    with jax.named_scope("block"):
        y = checkpoint_name(jnp.tanh(x @ params["w"][0]), "hidden")
    return jnp.sum(jnp.sin(y @ params["w"][1]))


def stopped(params, x):
    y = jnp.tanh(x @ params["w"][0])
    return jnp.sum(y * lax.stop_gradient(jnp.sin(y)))


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
