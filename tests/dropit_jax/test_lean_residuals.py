import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from dropit_jax import layer_preset, memory
from train.models.resnet import ResNet
from train.models.vit import ViT

_BATCH = 4
# What lean models cache of activations, by the names in `dropit_jax`.
_COMPACT = {"dropit", "gelu", "max_pool", "norm", "recompute", "relu"}


def _saved(model, size):
    x = jax.ShapeDtypeStruct((_BATCH, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), x)

    def loss(params, x):
        rest = {k: v for k, v in variables.items() if k != "params"}
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), rest)
        collections = {"params": params, **zeros}
        out, _ = model.apply(collections, x, True, mutable=["batch_stats"])
        return jnp.sum(out)

    return memory.saved_residuals(loss, variables["params"], x)


class LeanResidualsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("resnet", lambda memory: ResNet(10, width=8, stem="imagenet", memory=memory)),
        (
            "vit",
            lambda memory: ViT(10, 8, 32, num_layers=2, num_heads=2, memory=memory),
        ),
    )
    def test_of_activations_nothing_is_kept_but_what_is_compact(self, make):
        # Shortcuts, too, keep none of what they add.
        lean = _saved(make(layer_preset("lean")), 32)
        smallest = _BATCH * 8 * 4  # elements; statistics and the like are smaller
        large = [r for r in lean.residuals if r.is_cached and r.nbytes > 4 * smallest]
        self.assertNotEmpty(large)
        for residual in large:
            self.assertIn(residual.kind, _COMPACT, residual)
            self.assertIn(residual.dtype, ("uint8", "bfloat16"), residual)
        plain = _saved(make(layer_preset("baseline")), 32)
        self.assertLess(lean.total_bytes, 0.25 * plain.total_bytes)


if __name__ == "__main__":
    absltest.main()
