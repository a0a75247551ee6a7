import contextlib
import copy
import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from configs import digits_resnet18
from dropit_jax import PRESETS
from tests.train import commands
from train import data, models
from train.config import config as config_lib
from train.config.config import model_section
from train.engine import step as step_lib

# A ResNet-18 of two stages with a block each: of the steps here, most of the time is
# that of their compilation.
_SMALL = mock.patch.dict(models._MODELS, commands.SMALL_RESNET)


def setUpModule():
    _SMALL.start()


def tearDownModule():
    _SMALL.stop()


def _config(memory="baseline", layers="flax", **dropit):
    """A ResNet on small images."""
    config = digits_resnet18.get_config()
    config.memory, config.layers = memory, layers
    config.image_size, config.model.width, config.batch_size = 8, 4, 16
    config.schedule.warmup_epochs = 0.0  # the first step is one already
    config.dropit.update(dropit)
    return config


def _dropit_config(**dropit):
    """A ResNet of DropIT layers."""
    return _config(layers="dropit", **dropit)


def _vit_config(memory="baseline", layers="flax", dropit=(), **model):
    """A vision transformer, which has no batch norm and knows no other examples."""
    config = _config(memory, layers, **dict(dropit))
    config.model = model_section("vit_mu", patch_size=4, **model)
    return config


def _plain_sgd(config):
    """The config with updates that are the gradients themselves."""
    config.optimizer.update(
        learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.0
    )
    return config


@functools.cache
def _arrays(size, batch_size):
    dataset = data.load("digits", "", size, "none")
    batches = data.training_batches(dataset, batch_size, seed=42)
    with contextlib.closing(batches):
        return next(batches)


def _batch(config):
    arrays = _arrays(config.image_size, config.batch_size)
    return jax.tree.map(np.array, arrays)  # a copy, which may be changed


# What is compiled once serves all tests.
_COMPILED = {}


def _once(function):
    """Calls a function of a config once for all configs that are equal."""

    @functools.wraps(function)
    def call(config):
        key = function, config_lib.to_json(config)
        if key not in _COMPILED:
            # A copy: what is traced later must not see later changes.
            _COMPILED[key] = function(copy.deepcopy(config))
        return _COMPILED[key]

    return call


_initialise = _once(step_lib.initialise)


def _state(config):
    """The initial state, which depends on few fields of the config (see below)."""
    common = _config()
    common.model, common.seed = config.model, config.seed
    common.ema_decay = 0.9 if config.ema_decay else 0.0
    return _initialise(common)


@_once
def _train_step(config):
    return jax.jit(step_lib.train_step(config))


@_once
def _evaluation_step(config):
    return jax.jit(step_lib.evaluation_step(config))


@_once
def _model(config):
    """The model's own logits, of images that are normalised already."""
    model = step_lib.create_model(config)

    @functools.partial(jax.jit, static_argnums=3)
    def logits(params, batch_stats, images, train):
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, images, train, mutable=["batch_stats"])[0]

    return logits


def _trained(config):
    """A state in which no parameter is at its special first value, such as 0."""
    state, rng = _state(config), np.random.default_rng(0)
    return state.replace(
        params=jax.tree.map(
            lambda array: (
                np.asarray(array) + np.float32(rng.normal(0, 0.1, array.shape))
            ),
            state.params,
        )
    )


def _normalised(batch, config):
    """The images as the model takes them."""
    info, pixels = data.info(config.dataset), np.float64(batch["image"])
    if config.normalise == "unit":
        return np.float32(pixels / 127.5 - 1)
    return np.float32((pixels - info.mean) / info.std)


def _logits(config, state, batch, train):
    """The model's own logits of the images, with parameters of the state."""
    images = _normalised(batch, config)
    return np.asarray(_model(config)(state.params, state.batch_stats, images, train))


def _numpy_losses(logits, labels, smoothing=0.0):
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)) + top
    classes = logits.shape[-1]
    wanted = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    return (wanted * (log_z - logits)).sum(axis=-1)


def _numpy_sums(logits, batch, smoothing=0.0):
    losses = _numpy_losses(logits, batch["label"], smoothing)
    order = np.argsort(-logits, axis=-1)
    found = order == batch["label"][:, None]
    real = batch["mask"] > 0
    return step_lib.Sums(
        loss=np.float32(losses[real].sum()),
        correct=np.float32(found[real, :1].sum()),
        correct_top5=np.float32(found[real, :5].sum()),
        count=np.float32(real.sum()),
    )


def _key(state):
    """The random state of the next step."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.rng), int(state.step))


def _changed(a, b):
    """The paths of the arrays in which two trees differ by more than rounding."""
    pairs = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, x), y in pairs
        if not np.allclose(x, y, rtol=1e-4, atol=1e-5)
    }


def _differs(a, b, atol=1e-4):
    return any(
        not np.allclose(x, y, rtol=0, atol=atol)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


class AbstractTest(parameterized.TestCase):
    @parameterized.parameters((_config, 0.0), (_vit_config, 0.9))
    def test_describes_the_real_arguments(self, config, ema_decay):
        config = config()
        config.ema_decay = ema_decay
        _, (state, batch) = step_lib.abstract(config)
        real = _initialise(config)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, real)
        chex.assert_trees_all_equal_shapes_and_dtypes(batch, _batch(config))

    def test_allocates_nothing(self):
        config = digits_resnet18.get_config()
        config.batch_size, config.image_size, config.model.width = 1024, 512, 512
        config.ema_decay, config.accumulate_steps = 0.9, 4
        before = jax.live_arrays()  # and none of them goes meanwhile
        step, args = step_lib.abstract(config, batch_size=2048)
        new_state, sums = jax.eval_shape(step, *args)
        known = set(map(id, before))
        self.assertEmpty([a.shape for a in jax.live_arrays() if id(a) not in known])
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, args[0])
        self.assertEqual(args[1]["image"].shape, (2048, 512, 512, 1))
        self.assertEqual({leaf.shape for leaf in jax.tree.leaves(sums)}, {()})


class TrainStepTest(parameterized.TestCase):
    def test_the_initial_state_depends_on_the_seed_alone(self):
        config, dropped = _config(), _dropit_config()
        chex.assert_trees_all_equal(_initialise(config), _initialise(dropped))
        config.seed = 1
        states = [_initialise(each) for each in (config, dropped)]
        kernels = [state.params["head"]["kernel"] for state in states]
        self.assertGreater(float(jnp.abs(kernels[0] - kernels[1]).max()), 0)

    def test_the_initial_state_does_not_depend_on_how_it_is_trained(self):
        config, other = _vit_config(), _plain_sgd(_vit_config("lean", dropout=0.2))
        other.dtype, other.mixup, other.accumulate_steps = "bfloat16", 0.2, 2
        other.optimizer.clip_norm = 1.0
        chex.assert_trees_all_equal(_initialise(config), _initialise(other))

    def test_at_rate_zero_it_is_the_flax_models_step(self):
        results = []
        for config in (_dropit_config(rate=0.0, value_dtype=None), _config()):
            results.append(_train_step(config)(_state(config), _batch(config)))
        chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)

    def test_dropping_changes_the_kernels_that_drop_and_nothing_else(self):
        states = []
        for config in (_dropit_config(), _config()):
            states.append(_train_step(config)(_state(config), _batch(config)))
        (dropped, sums), (plain, expected) = states
        chex.assert_trees_all_close(
            (dropped.batch_stats, sums),
            (plain.batch_stats, expected),
            rtol=1e-5,
            atol=1e-6,
        )
        changed = _changed(dropped.params, plain.params)
        first, second = "stage1_block1", "stage2_block1"
        expected = {
            *(f"{block}/conv{n}/kernel" for block in (first, second) for n in (1, 2)),
            *(f"{second}/shortcut_conv/kernel", "head/kernel"),
        }
        self.assertEqual(changed, expected)  # and not that of the stem

    def test_counts_its_steps_and_returns_the_sums_before_the_update(self):
        config = _config()
        config.normalise = "unit"
        state, batch = _trained(config), _batch(config)
        new_state, sums = _train_step(config)(state, batch)
        self.assertEqual(new_state.step, 1)
        expected = _numpy_sums(_logits(config, state, batch, True), batch)
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)
        self.assertBetween(sums.correct_top5, sums.correct, 16)

    def test_learns_a_batch_by_heart(self):
        config = _dropit_config()
        step = _train_step(config)
        state, batch, losses = _state(config), _batch(config), []
        for _ in range(100):
            state, sums = step(state, batch)
            losses.append(float(sums.loss / sums.count))
        self.assertGreater(losses[0], 2.0)
        self.assertLess(losses[-1], 0.1)
        self.assertEqual((sums.correct, sums.correct_top5, sums.count), (16, 16, 16))

    def test_gradients_are_those_of_the_mean_loss(self):
        config = _plain_sgd(_vit_config())
        config.label_smoothing = 0.1
        state, batch = _trained(config), _batch(config)
        new_state, sums = _train_step(config)(state, batch)
        gradients, loss, _ = _by_hand(config, state.params, {}, batch, _key(state))
        expected = jax.tree.map(np.subtract, state.params, gradients)
        chex.assert_trees_all_close(new_state.params, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(sums.loss / 16, loss, rtol=1e-5)
        logits = _logits(config, state, batch, True)
        np.testing.assert_allclose(
            sums.loss, _numpy_losses(logits, batch["label"], 0.1).sum(), rtol=1e-5
        )
        # Without batch norm, parts are as one.
        config.accumulate_steps = 16
        split, found = _train_step(config)(state, batch)
        chex.assert_trees_all_close(split, new_state, rtol=1e-5, atol=2e-6)
        chex.assert_trees_all_close(found, sums, rtol=1e-5)
        self.assertEqual(
            (found.correct, found.correct_top5, found.count),
            (sums.correct, sums.correct_top5, sums.count),
        )

    def test_can_be_given_its_state_again_and_again(self):
        config = _vit_config(scan=True)
        config.ema_decay = 0.9
        step = jax.jit(step_lib.train_step(config), donate_argnums=0)
        state, batch = step_lib.initialise(config), _batch(config)
        for number in range(3):
            old, (state, _) = state, step(state, batch)
            self.assertEqual(state.step, number + 1)
            self.assertTrue(all(leaf.is_deleted() for leaf in jax.tree.leaves(old)))
        for leaf in jax.tree.leaves(state):
            self.assertFalse(np.isnan(leaf).any())


def _by_hand(config, params, batch_stats, batch, key):
    """Gradients, mean loss and batch statistics, with Flax and optax alone."""
    dropout, dropit, _ = jax.random.split(key, 3)
    (loss, batch_stats), gradients = _gradient(config)(
        params,
        batch_stats,
        _normalised(batch, config),
        batch["label"],
        {"dropout": dropout, "dropit": dropit},
    )
    return gradients, loss, batch_stats


@_once
def _gradient(config):
    model = step_lib.create_model(config)

    def loss_fn(params, batch_stats, images, labels, rngs):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(
            variables, images, True, mutable=["batch_stats"], rngs=rngs
        )
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, 10), config.label_smoothing)
        losses = optax.softmax_cross_entropy(logits, wanted)
        return losses.mean(), updates.get("batch_stats", {})

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


class AccumulationTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("resnet", _config, {}),
        # What is dropped is random, by DropIT and by dropout, and other in every part.
        (
            "vit_random",
            _vit_config,
            {
                "layers": "dropit",
                "dropit": {"strategy": "random", "granularity": "channel"},
                "dropout": 0.2,
            },
        ),
    )
    def test_is_done_part_by_part(self, config, kwargs):
        config = _plain_sgd(config(**kwargs))
        config.accumulate_steps = parts = 2
        state, batch = _trained(config), _batch(config)
        new_state, sums = _train_step(config)(state, batch)
        total, losses, batch_stats = None, [], state.batch_stats
        for part in range(parts):
            examples = {name: array[part::parts] for name, array in batch.items()}
            key = jax.random.fold_in(_key(state), part)
            gradients, loss, batch_stats = _by_hand(
                config, state.params, batch_stats, examples, key
            )
            losses.append(float(loss))
            total = gradients if part == 0 else jax.tree.map(np.add, total, gradients)
        expected = jax.tree.map(
            lambda p, g: np.asarray(p) - np.asarray(g) / parts, state.params, total
        )
        chex.assert_trees_all_close(new_state.params, expected, rtol=1e-4, atol=5e-5)
        chex.assert_trees_all_close(
            new_state.batch_stats, batch_stats, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(sums.loss, sum(losses) * 16 / parts, rtol=1e-5)
        self.assertEqual(sums.count, 16)
        self.assertEqual(new_state.step, 1)

    def test_batch_norm_normalises_parts_by_themselves(self):
        config = _config()
        state, batch = _trained(config), _batch(config)
        whole, sums = _train_step(config)(state, batch)
        # Sums and statistics are those before the update, whatever that is.
        _plain_sgd(config).accumulate_steps = 2
        split, found = _train_step(config)(state, batch)
        # The statistics of the stem, whose inputs do not depend on other statistics.
        old, one, two = (
            np.asarray(each.batch_stats["stem_norm"]["mean"], np.float64)
            for each in (state, whole, split)
        )
        # Parts are of one size, so that the mean of the whole batch is the mean of
        # theirs: m0, m1. Running means are 0.9 old + 0.1 (m0 + m1) / 2 for one step,
        # and 0.81 old + 0.09 m0 + 0.1 m1 for two.
        halves = [
            {name: array[part::2] for name, array in batch.items()} for part in (0, 1)
        ]
        means = [_stem_mean(config, state, half) for half in halves]
        np.testing.assert_allclose(one, 0.9 * old + 0.05 * sum(means), atol=1e-5)
        np.testing.assert_allclose(
            two, 0.81 * old + 0.09 * means[0] + 0.1 * means[1], atol=1e-5
        )
        self.assertTrue(_differs(whole.batch_stats, split.batch_stats))
        self.assertNotAlmostEqual(float(sums.loss), float(found.loss), places=3)


def _stem_mean(config, state, batch):
    """The mean over a batch of what the first convolution gives."""
    outputs = jax.lax.conv_general_dilated(
        _normalised(batch, config),
        state.params["stem_conv"]["kernel"],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return np.float64(outputs).mean(axis=(0, 1, 2))


class EmaTest(parameterized.TestCase):
    def test_is_the_average_of_parameters(self):
        """And changes nothing in training."""
        config = _vit_config()
        plain, batch = _state(config), _batch(config)
        plain_step = _train_step(config)
        config.ema_decay = decay = 0.9
        state, step = _state(config), _train_step(config)
        chex.assert_trees_all_equal(state.ema_params, state.params)
        expected = jax.tree.map(np.float64, state.params)
        for _ in range(3):
            state, sums = step(state, batch)
            plain, plain_sums = plain_step(plain, batch)
            chex.assert_trees_all_close(
                (state.params, state.opt_state, sums),
                (plain.params, plain.opt_state, plain_sums),
                rtol=1e-6,
                atol=1e-7,
            )
            expected = jax.tree.map(
                lambda mean, new: decay * mean + (1 - decay) * np.float64(new),
                expected,
                state.params,
            )
            chex.assert_trees_all_close(
                state.ema_params, jax.tree.map(np.float32, expected), rtol=0, atol=1e-6
            )
        self.assertTrue(_differs(state.ema_params, state.params))
        self.assertEqual(plain.ema_params, {})
        self.assertIs(plain.variables["params"], plain.params)

    def test_is_what_is_evaluated(self):
        config = _vit_config()
        config.ema_decay = 0.9
        state, batch = _trained(config), _batch(config)
        other = jax.tree.map(lambda array: -array, state.params)
        state = state.replace(ema_params=other)
        sums = _evaluation_step(config)(state, batch)
        logits = [
            _logits(config, state.replace(params=params), batch, False)
            for params in (other, state.params)
        ]
        expected, wrong = (_numpy_sums(each, batch) for each in logits)
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)
        self.assertNotAlmostEqual(float(sums.loss), float(wrong.loss), places=2)
        self.assertIs(state.variables["params"], state.ema_params)


class MixupTest(parameterized.TestCase):
    def test_mixes_images_and_labels_with_one_weight(self):
        config = _vit_config()
        config.mixup, config.label_smoothing = 0.8, 0.1
        for step in (0, 3):
            self._check_mixed(config, step)

    def _check_mixed(self, config, step):
        state, batch = _trained(config), _batch(config)
        state = state.replace(step=jnp.int32(step))
        _, sums = _train_step(config)(state, batch)
        key = jax.random.split(_key(state), 3)[2]
        weight = float(jax.random.beta(key, 0.8, 0.8))
        weight = max(weight, 1 - weight)
        self.assertBetween(weight, 0.5, 0.99)  # so that something is mixed
        images = _normalised(batch, config)
        mixed = np.float32(weight * images + (1 - weight) * images[::-1])
        model = _model(_vit_config())
        logits = np.asarray(model(state.params, state.batch_stats, mixed, True))
        losses = [
            _numpy_losses(logits, labels, 0.1)
            for labels in (batch["label"], batch["label"][::-1])
        ]
        expected = _numpy_sums(logits, batch)  # of the first labels
        expected = expected.replace(
            loss=np.float32(np.sum(weight * losses[0] + (1 - weight) * losses[1]))
        )
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)

    def test_parts_of_a_batch_are_mixed_by_themselves(self):
        config = _vit_config()
        config.mixup, config.accumulate_steps = 0.8, 16
        state, batch = _trained(config), _batch(config)
        _, sums = _train_step(config)(state, batch)
        # Each of the parts has one example, which is mixed with itself.
        config.mixup, config.accumulate_steps = 0.0, 1
        expected = _numpy_sums(_logits(config, state, batch, True), batch)
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)

    def test_without_it_nothing_is_random(self):
        config = _vit_config()
        state, batch = _trained(config), _batch(config)
        others = [state.replace(rng=state.rng + n) for n in (1, 2)]
        step = _train_step(config)
        results = [step(other, batch) for other in others]
        found, expected = ((s.params, sums) for s, sums in results)
        chex.assert_trees_all_equal(found, expected)  # to the last bit
        logits = _logits(config, state, batch, True)
        chex.assert_trees_all_close(
            results[0][1], _numpy_sums(logits, batch), rtol=1e-5
        )
        config.mixup, config.label_smoothing = 0.8, 0.1
        step = _train_step(config)
        losses = [float(step(other, batch)[1].loss) for other in others]
        self.assertNotEqual(*losses)


def _equations(jaxpr):
    """All equations of a program, those of its functions among them."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)  # noqa: PLW2901
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _products(step, *args):
    """dtypes of the operands, and shapes, of matrix products and convolutions."""
    for equation in _equations(jax.make_jaxpr(step)(*args).jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            avals = [var.aval for var in (*equation.invars, *equation.outvars)]
            dtypes = {str(aval.dtype) for aval in avals[:2]}
            yield dtypes, [aval.shape for aval in avals]


_CONFIGS = {
    "resnet": _config,
    "resnet_dropit": _dropit_config,
    "vit": _vit_config,
    "vit_lean": functools.partial(_vit_config, "lean", scan=True),
}


class MemoryTest(parameterized.TestCase):
    """Steps of which `config.memory` is a preset, beside that of the plain loss."""

    def test_exact_is_the_plain_step(self):
        config = _plain_sgd(_config())
        state, batch = _trained(config), _batch(config)
        expected = _train_step(config)(state, batch)
        config.memory = "exact"
        found = _train_step(config)(state, batch)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=2e-5)

    def test_each_is_as_near_as_it_is_said_to_be(self):
        config = _plain_sgd(_vit_config())
        config.label_smoothing = 0.1
        state, batch = _trained(config), _batch(config)
        plain, sums = _train_step(config)(state, batch)
        gradients = jax.tree.map(np.subtract, plain.params, state.params)
        off = {}
        for config.memory in PRESETS:
            # The exact gradients are so in parts as well, of blocks computed again.
            exact = config.memory == "exact"
            config.remat, config.accumulate_steps = (
                ("blocks", 2) if exact else ("none", 1)
            )
            found, same = _train_step(config)(state, batch)
            chex.assert_trees_all_close(same, sums, rtol=1e-5)
            error = jax.tree.map(np.subtract, found.params, plain.params)
            off[config.memory] = float(
                optax.tree.norm(error) / optax.tree.norm(gradients)
            )
            if config.memory == "dropit":
                changed = _changed(found.params, plain.params)
        self.assertEqual(set(off), {"exact", "dropit", "lean", "leanest"})
        self.assertLess(off["exact"], 1e-5)
        self.assertBetween(off["lean"], 1e-4, 0.02)
        self.assertBetween(off["leanest"], off["lean"], 0.3)
        self.assertBetween(off["dropit"], off["leanest"], 1)
        # The policy is for the inputs of layers, of which their kernels' gradients are.
        self.assertNotEmpty(changed)
        self.assertTrue(all(name.endswith("/kernel") for name in changed), changed)

    def test_random_elements_are_those_of_the_key(self):
        config = _plain_sgd(_vit_config("dropit", dropit={"strategy": "random"}))
        state, batch = _trained(config), _batch(config)
        step = _train_step(config)
        first, again, other = (
            step(state.replace(rng=state.rng + n), batch) for n in (0, 0, 1)
        )
        chex.assert_trees_all_equal(first, again)
        # The loss is the same, and so are the gradients of all but kernels.
        chex.assert_trees_all_equal(first[1], other[1])
        changed = _changed(first[0].params, other[0].params)
        self.assertNotEmpty(changed)
        self.assertTrue(all(name.endswith("/kernel") for name in changed), changed)

    @parameterized.parameters(
        ("exact", "flax", "dots"),
        ("lean", "dropit", "none"),
        ("exact", "dropit", "blocks"),
        ("dropit", "dropit", "dots"),
    )
    def test_goes_with_all_other_ways(self, memory, layers, remat):
        config = _vit_config(memory, layers, scan=remat == "blocks", dropout=0.1)
        config.remat = remat
        step, (state, batch) = step_lib.abstract(config)
        found, _ = jax.eval_shape(step, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, state)


class DtypeTest(parameterized.TestCase):
    @parameterized.parameters(*_CONFIGS)
    def test_of_the_computation_is_not_that_of_the_state(self, name):
        config = _CONFIGS[name]()
        config.dtype, config.ema_decay = "bfloat16", 0.9
        config.accumulate_steps = 2 if name == "vit" else 1
        step, (state, batch) = step_lib.abstract(config)
        new_state, sums = jax.eval_shape(step, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        numbers = (*new_state.variables.values(), new_state.params, sums)
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(numbers)}
        self.assertEqual(dtypes, {"float32"})
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(new_state.opt_state)}
        self.assertEqual(dtypes, {"float32", "int32"})  # numbers, and counts

    def test_the_loss_is_nearly_that_of_float32(self):
        config = _dropit_config()
        state, batch, results = _trained(config), _batch(config), []
        for config.dtype in ("float32", "bfloat16"):
            results.append(_train_step(config)(state, batch))
        (full, sums), (half, found) = results
        chex.assert_trees_all_equal_shapes_and_dtypes(full, half)
        np.testing.assert_allclose(found.loss, sums.loss, rtol=0.03)
        self.assertNotEqual(float(found.loss), float(sums.loss))

    @parameterized.parameters(*_CONFIGS)
    def test_logits_are_float32(self, name):
        config = _CONFIGS[name]()
        config.dtype = "bfloat16"
        state, batch = step_lib.abstract_state(config), _batch(config)
        model = step_lib.create_model(config)
        logits = jax.eval_shape(
            lambda state, images: model.apply(state.variables, images, False),
            state,
            jnp.float32(batch["image"]),
        )
        self.assertEqual((logits.shape, logits.dtype), ((16, 10), jnp.float32))

    @parameterized.parameters("resnet", "vit")
    def test_products_are_of_that_dtype_but_the_last(self, name):
        config = _CONFIGS[name]()
        state, batch = step_lib.abstract_state(config), _batch(config)
        found = list(_products(step_lib.train_step(config), state, batch))
        self.assertEqual({str(dtypes) for dtypes, _ in found}, {"{'float32'}"})
        config.dtype = "bfloat16"
        changed = list(_products(step_lib.train_step(config), state, batch))
        self.assertEqual([shapes for _, shapes in changed], [s for _, s in found])
        kept = [shapes for dtypes, shapes in changed if dtypes != {"bfloat16"}]
        # The head: its logits, and the gradients of its kernel and its input.
        self.assertLen(kept, 3)
        for shapes in kept:
            self.assertIn(10, sum(shapes, ()))
        self.assertGreater(len(changed), 15)


class EvaluationStepTest(parameterized.TestCase):
    @parameterized.parameters((_config, "dataset"), (_vit_config, "unit"))
    def test_padding_does_not_count(self, config, normalise):
        config = config()
        config.normalise = normalise
        state, batch = _trained(config), _batch(config)
        batch["mask"] = np.float32(np.arange(16) < 11)
        batch["image"][11:] = 255
        sums = _evaluation_step(config)(state, batch)
        expected = _numpy_sums(_logits(config, state, batch, False), batch)
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)
        self.assertEqual(sums.count, 11)

    def test_is_of_the_labels_and_images_as_they_are(self):
        config = _vit_config(dropout=0.5, drop_path=0.5)
        config.label_smoothing, config.mixup, config.accumulate_steps = 0.5, 0.8, 2
        state, batch = _trained(config), _batch(config)
        sums = _evaluation_step(config)(state, batch)
        expected = _numpy_sums(_logits(config, state, batch, False), batch)
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)

    def test_nothing_but_padding_is_nothing(self):
        config = _vit_config()
        batch = _batch(config)
        batch["mask"][:] = 0
        step = _evaluation_step(config)
        sums = step(_state(config), batch)
        self.assertEqual({float(leaf) for leaf in jax.tree.leaves(sums)}, {0.0})


if __name__ == "__main__":
    absltest.main()
