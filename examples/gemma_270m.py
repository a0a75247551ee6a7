"""Gemma 3 270M of DeepMind's `gemma`: trained with less memory.

Nothing is downloaded: the weights are random.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import report
from gemma import gm
from jax import ShapeDtypeStruct

import dropit_jax

FULL = gm.nn.Gemma3_270M.config
REAL = dataclasses.replace(FULL, attention_types=FULL.attention_types[:12])
SMALL = dataclasses.replace(
    FULL,
    num_embed=256,
    embed_dim=64,
    hidden_dim=128,
    head_dim=32,
    sliding_window_size=8,
    attention_types=FULL.attention_types[4:6],  # one local, one global
)
BATCH, LENGTH = 4, 1024
CHUNKS = 8


def main() -> None:
    """Prints the tables."""
    target = report.arguments(__doc__).target

    model = gm.nn.Gemma3_270M(config=SMALL, dtype=jnp.float32)
    loss = training_loss(model)
    dropped = {preset: dropit_jax.drop(loss, preset) for preset in report.PRESETS}
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 1, SMALL.num_embed)
    params = model.init(jax.random.key(0), tokens)["params"]
    report.gradients(loss, dropped, params, tokens)

    model = gm.nn.Gemma3_270M(config=REAL)
    loss = training_loss(model)
    dropped = {preset: dropit_jax.drop(loss, preset) for preset in report.PRESETS}
    tokens = ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    print(f"Gemma 270M, 12 of its 18 layers, {BATCH} x {LENGTH} tokens, bfloat16:")
    report.memory_table(loss, dropped, params, tokens, target=target)

    loss = loss_in_chunks(model)
    dropped = {preset: dropit_jax.drop(loss, preset) for preset in report.PRESETS}
    print(f"The same, its logits in {CHUNKS} chunks:")
    report.memory_table(loss, dropped, params, tokens, target=target)


def training_loss(model: gm.nn.Transformer):
    """The loss of predicting the next token."""

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens).logits
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
        ).mean()

    return loss


def loss_in_chunks(model: gm.nn.Transformer):
    """The same loss, with the logits of a part of the tokens at a time.

    For 262,144 words the logits of all tokens are larger than all else together.
    """

    def loss(params, tokens):
        output = model.apply({"params": params}, tokens, return_hidden_states=True)
        embedding = params["embedder"]["input_embedding"]

        @jax.checkpoint
        def of_chunk(total, chunk):
            hidden, targets, weights = chunk
            logits = jnp.dot(hidden, embedding.T).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return total + jnp.sum(weights * losses), None

        targets = jnp.roll(tokens, -1, axis=1)
        weights = jnp.ones(tokens.shape).at[:, -1].set(0)  # nothing follows the last
        chunks = jax.tree.map(
            lambda x: jnp.stack(jnp.split(x, CHUNKS, axis=1)),
            (output.hidden_states, targets, weights),
        )
        total, _ = jax.lax.scan(of_chunk, jnp.zeros(()), chunks)
        return total / weights.sum()

    return loss


if __name__ == "__main__":
    main()
