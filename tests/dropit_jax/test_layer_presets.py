import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

import dropit_jax
from dropit_jax import LAYER_PRESETS, DropIT, LayerPreset, layer_preset
from dropit_jax import linen as dn
from dropit_jax.linen import toolbox


class PresetTest(parameterized.TestCase):
    def test_each_level_has_what_the_one_before_has(self):
        self.assertEqual(LAYER_PRESETS, ("baseline", "dropit", "lean"))
        baseline, dropit, lean = map(layer_preset, LAYER_PRESETS)
        self.assertEqual(baseline, LayerPreset("baseline"))
        self.assertEqual((dropit.dropit.rate, dropit.conv.rate), (0.875, 0.875))
        self.assertTrue(dropit.one_bit and not dropit.eight_bit)
        self.assertTrue(lean.one_bit and lean.eight_bit)
        self.assertIsNotNone(lean.dropit)

    @parameterized.parameters("dropit", "lean")
    def test_fields_of_both_policies_can_be_changed(self, name):
        changed = layer_preset(name, remat="dots", rate=0.25, chunk_size=None)
        plain = layer_preset(name)
        for field in ("dropit", "conv"):
            policy = dataclasses.replace(
                getattr(plain, field), rate=0.25, chunk_size=None
            )
            self.assertEqual(getattr(changed, field), policy)
        self.assertEqual(changed.remat, "dots")
        self.assertEqual(hash(changed), hash(dataclasses.replace(changed)))

    def test_of_a_vector_there_is_no_mean(self):
        mean = layer_preset("lean", rate=0.5, fill="mean")
        self.assertEqual(mean.for_vectors, layer_preset("lean", rate=0.5))
        for name in ("baseline", "dropit"):
            self.assertEqual(layer_preset(name).for_vectors, layer_preset(name))

    def test_what_there_is_not_is_named(self):
        with pytest.raises(ValueError, match=r"'leen'; known are .* mean 'lean'\?"):
            layer_preset("leen")
        with pytest.raises(ValueError, match=r"remat: unknown value 'all'.*'blocks'"):
            layer_preset("lean", remat="all")
        with pytest.raises(ValueError, match=r"'baseline' has no policy, so rate"):
            layer_preset("baseline", rate=0.5)
        with pytest.raises(ValueError, match=r"rate must be in"):
            layer_preset("lean", rate=2)
        with pytest.raises(ValueError, match=r"Unknown preset \['lean'\]"):
            layer_preset(["lean"])
        with pytest.raises(TypeError, match=r"no field 'ratio'; .* mean rate\?"):
            layer_preset("lean", ratio=0.5)
        with pytest.raises(TypeError, match=r"takes a preset.*got 'lean'"):
            toolbox("lean")
        with pytest.raises(TypeError, match=r"takes a policy"):
            LayerPreset("mine", dropit=0.5)


class Everything(nn.Module):
    """One of each."""

    memory: LayerPreset

    @nn.compact
    def __call__(self, x, train):
        tools = toolbox(self.memory)
        x = tools.Conv(8, (3, 3))(x)
        x = tools.relu(tools.BatchNorm(use_running_average=not train)(x))
        x = tools.max_pool(x, (2, 2), strides=(2, 2))
        x = tools.silu(tools.GroupNorm(2)(x)).reshape(x.shape[0], -1, x.shape[-1])
        x = x + tools.MultiHeadDotProductAttention(2)(tools.LayerNorm()(x))
        x = tools.gelu(tools.DenseGeneral(16)(tools.RMSNorm()(x)))
        x = tools.Dropout(0.5, deterministic=not train)(tools.tanh(x))
        return tools.sigmoid(tools.Dense(3)(x))


class ToolboxTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
        cls.variables = jax.jit(
            lambda: Everything(layer_preset("baseline")).init(
                jax.random.key(1), cls.x, False
            )
        )()

    @classmethod
    @functools.cache
    def _run(cls, memory):
        model = Everything(memory)

        def loss(params, x):
            out, updates = model.apply(
                cls.variables | {"params": params},
                x,
                True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(2)},
            )
            return jnp.sum(out**2), (out, updates)

        def run(params, x):
            # A division by a number that XLA does not know is not reassociated.
            (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, x)
            return aux, grads

        return jax.jit(run)(cls.variables["params"], cls.x)

    @parameterized.parameters("dropit", "lean")
    def test_the_output_is_flaxs_and_the_gradient_near(self, name):
        expected, exact = self._run(layer_preset("baseline"))
        actual, gradients = self._run(layer_preset(name, rate=0, value_dtype=None))
        for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            self.assertLess(float(jnp.abs(a - b).max()), 1e-5)
        differences = jax.tree.map(jnp.subtract, gradients, exact)
        norm = [
            float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))))
            for tree in (differences, exact)
        ]
        # Bits lose nothing; bytes, some hundredths.
        self.assertLess(norm[0], (1e-5 if name == "dropit" else 0.03) * norm[1])

    def test_the_baseline_is_flax(self):
        tools = toolbox(layer_preset("baseline"))
        for field in dataclasses.fields(tools):
            tool = getattr(tools, field.name)
            if isinstance(tool, functools.partial) and "dropit" in tool.keywords:
                self.assertIsNone(tool.keywords["dropit"])
                self.assertIs(tool.func, getattr(dn, field.name))
            elif field.name != "remat":
                self.assertIs(tool, getattr(nn, field.name))

    def test_a_level_takes_what_it_says(self):
        dropit, lean = toolbox(layer_preset("dropit")), toolbox(layer_preset("lean"))
        for tools in (dropit, lean):
            self.assertIs(tools.relu, dropit_jax.nn.relu)
            self.assertIs(tools.max_pool, dropit_jax.nn.max_pool)
            self.assertIs(tools.Dropout, dn.Dropout)
        self.assertIs(dropit.gelu, nn.gelu)
        self.assertIs(dropit.LayerNorm, nn.LayerNorm)
        self.assertIs(lean.gelu, dropit_jax.nn.gelu)
        self.assertIs(lean.LayerNorm, dn.LayerNorm)
        for name in ("Conv", "ConvLocal", "ConvTranspose"):
            conv = getattr(lean, name)
            self.assertEqual(conv.keywords["dropit"], layer_preset("lean").conv)
        self.assertEqual(lean.Dense.keywords["dropit"], layer_preset("lean").dropit)
        self.assertIsInstance(layer_preset("lean").conv, DropIT)


if __name__ == "__main__":
    absltest.main()
