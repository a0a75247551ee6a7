"""GPT-2 of Hugging Face's transformers, in Flax: trained with less memory.

Nothing is downloaded: the weights are random.
"""

import jax
import jax.numpy as jnp
import optax
import report
from jax import ShapeDtypeStruct
from transformers import FlaxGPT2LMHeadModel, GPT2Config

import dropit_jax

SMALL = GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=2)
REAL = GPT2Config()  # 124 million parameters
BATCH, LENGTH = 8, 1024


def main() -> None:
    """Prints the tables."""
    target = report.arguments(__doc__).target

    model = FlaxGPT2LMHeadModel(SMALL, _do_init=False)
    loss = training_loss(model)
    dropped = {preset: dropit_jax.drop(loss, preset) for preset in report.PRESETS}
    params = model.init_weights(jax.random.key(0), (1, 1))
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 0, SMALL.vocab_size)
    report.gradients(loss, dropped, params, tokens, jax.random.key(2))

    model = FlaxGPT2LMHeadModel(REAL, dtype=jnp.bfloat16, _do_init=False)
    loss = training_loss(model)
    dropped = {preset: dropit_jax.drop(loss, preset) for preset in report.PRESETS}
    tokens = ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    print(f"GPT-2, {BATCH} x {LENGTH} tokens, bfloat16:")
    report.memory_table(
        loss, dropped, model.params_shape_tree, tokens, key, target=target
    )


def training_loss(model: FlaxGPT2LMHeadModel):
    """The loss of predicting the next token, with the dropout of the config."""

    def loss(params, tokens, key):
        logits = model(tokens, params=params, dropout_rng=key, train=True).logits
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
        ).mean()

    return loss


if __name__ == "__main__":
    main()
