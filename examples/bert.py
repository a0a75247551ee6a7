"""BERT of Hugging Face's transformers, in Flax: trained with less memory.

Nothing is downloaded: the weights are random.
"""

import jax
import jax.numpy as jnp
import optax
import report
from jax import ShapeDtypeStruct
from transformers import BertConfig, FlaxBertForMaskedLM

import dropit_jax

SMALL = BertConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=256,
    max_position_embeddings=32,
)
REAL = BertConfig()  # base: 110 million parameters
BATCH, LENGTH = 32, 512
MASK = 103  # the token that stands for one to be guessed


def main() -> None:
    """Prints the tables."""
    target = report.arguments(__doc__).target

    model = FlaxBertForMaskedLM(SMALL, _do_init=False)
    loss = training_loss(model)
    dropped = {preset: dropit_jax.drop(loss, preset) for preset in report.PRESETS}
    params = model.init_weights(jax.random.key(0), (1, 1))
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 0, SMALL.vocab_size)
    report.gradients(loss, dropped, params, tokens, jax.random.key(2))

    model = FlaxBertForMaskedLM(REAL, dtype=jnp.bfloat16, _do_init=False)
    loss = training_loss(model)
    dropped = {preset: dropit_jax.drop(loss, preset) for preset in report.PRESETS}
    tokens = ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    print(f"BERT base, {BATCH} x {LENGTH} tokens, bfloat16:")
    report.memory_table(
        loss, dropped, model.params_shape_tree, tokens, key, target=target
    )


def training_loss(model: FlaxBertForMaskedLM):
    """The loss of guessing masked tokens, with the dropout of the config."""

    def loss(params, tokens, key):
        masking, dropout = jax.random.split(key)
        is_masked = jax.random.bernoulli(masking, 0.15, tokens.shape)
        seen = jnp.where(is_masked, MASK, tokens)
        logits = model(seen, params=params, dropout_rng=dropout, train=True).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), tokens
        )
        return jnp.mean(losses, where=is_masked)

    return loss


if __name__ == "__main__":
    main()
