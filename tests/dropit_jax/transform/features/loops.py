"""Loops, conditionals, and `jax.checkpoint`."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.dropit_jax.transform.features.network import layer, mlp


def scan(params, x):
    def turn(x, slices):
        y = layer(x, slices["w"], slices["b"])
        return y, jnp.sum(y**2)

    y, sums = lax.scan(turn, x, params)
    return jnp.sum(y) + jnp.sum(sums)


def scan_reversed(params, x):
    y, ys = lax.scan(
        lambda c, p: (layer(c, p["w"], p["b"]), c), x, params, reverse=True
    )
    return jnp.sum(jnp.sin(y)) + jnp.sum(ys**2)


def scan_unrolled(params, x):
    y, _ = lax.scan(lambda c, p: (layer(c, p["w"], p["b"]), None), x, params, unroll=2)
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
    block = jax.checkpoint(lambda c, p: (layer(c, p["w"], p["b"]), None))
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
        x = jax.checkpoint(layer)(x, w, b)
    return jnp.sum(x**2)


def lax_map(params, x):
    return jnp.sum(lax.map(lambda row: jnp.tanh(row @ params["w"][0]), x) ** 2)


def associative_scan(params, x):
    y = lax.associative_scan(jnp.multiply, 1 + 0.1 * jnp.tanh(x @ params["w"][0]))
    return jnp.sum(y**2)


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
