import importlib
import inspect
from pathlib import Path

import jax
import pytest
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from dropit_jax import DropIT
from tests.data import write_tiny_datasets as tiny
from tests.train.fields import refusal
from train import data, models
from train.config import config as config_lib
from train.config import validation, variants
from train.config.defaults import get_defaults
from train.engine import step as step_lib

_CONFIGS = Path(__file__).parents[3] / "configs"
_NAMES = (
    *("digits_resnet18", "digits_vit"),
    *("resnet18_cifar10", "resnet18_cifar100", "resnet18_imagenet"),
    *("vit_b16_cifar100", "vit_b16_imagenet", "vit_ti16_cifar10"),
)

# What the paper says of its experiments: "200 epochs" and so on, §4.1.
_PAPER = {
    "resnet18_cifar100": {
        "dataset": "cifar100",
        "image_size": 32,
        "batch_size": 128,
        "num_epochs": 200,
        "num_steps": None,
        "model.name": "resnet18",
        "model.width": 64,
        "optimizer.momentum": 0.9,
        "schedule.name": "step",
        "schedule.decay_epochs": (60, 120, 160),
        "schedule.decay_factor": 0.2,
        "schedule.warmup_epochs": 0,
    },
    "resnet18_imagenet": {
        "dataset": "imagenet2012",
        "image_size": 224,
        "batch_size": 256,
        "num_epochs": 90,
        "num_steps": None,
        "model.name": "resnet18",
        "model.width": 64,
        "model.stem": "imagenet",
        "optimizer.learning_rate": 0.1,
        "optimizer.momentum": 0.9,
        "schedule.name": "step",
        "schedule.decay_epochs": (30, 60),
        "schedule.decay_factor": 0.1,
        "schedule.warmup_epochs": 0,
    },
    "vit_b16_cifar100": {
        "dataset": "cifar100",
        "image_size": 224,
        "batch_size": 512,
        "num_epochs": None,
        "num_steps": 10_000,
        "model.name": "vit_b",
        "model.patch_size": 16,
        "normalise": "unit",
        "optimizer.learning_rate": 0.03,
        "optimizer.momentum": 0.9,
        "schedule.name": "cosine",
    },
    "vit_b16_imagenet": {
        "dataset": "imagenet2012",
        "image_size": 224,
        "batch_size": 512,
        "num_epochs": None,
        "num_steps": 20_000,
        "model.name": "vit_b",
        "model.patch_size": 16,
        "normalise": "unit",
        "optimizer.learning_rate": 0.01,
        "optimizer.momentum": 0.9,
        "schedule.name": "cosine",
    },
}
# Not the paper's: those of whom it follows, as the files say.
_CITED = {
    # Zagoruyko and Komodakis, 2016, §3.
    "resnet18_cifar100": {
        "optimizer.learning_rate": 0.1,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 0.0005,
        "augmentation": "shift_flip",
    },
    # He et al., 2016, §3.4.
    "resnet18_imagenet": {"optimizer.weight_decay": 0.0001},
    # Dosovitskiy et al., 2021, App. B.1.1.
    "vit_b16_cifar100": {"optimizer.clip_norm": 1, "optimizer.weight_decay": 0},
    "vit_b16_imagenet": {"optimizer.clip_norm": 1, "optimizer.weight_decay": 0},
}


def _get(name, *variant):
    return importlib.import_module(f"configs.{name}").get_config(*variant)


def _value(config, name):
    for part in name.split("."):
        config = config[part]
    return config


class ApplyTest(parameterized.TestCase):
    def test_without_a_variant_nothing_changes(self):
        config = get_defaults()
        self.assertIs(variants.apply(config, "", paper_rate=0.8), config)
        self.assertEqual(config, get_defaults())

    @parameterized.parameters(0.8, 0.9)
    def test_of_the_paper_are_the_fields_that_say_what_is_dropped(self, rate):
        config = variants.apply(get_defaults(), "paper", paper_rate=rate)
        self.assertEqual((config.memory, config.layers), ("baseline", "dropit"))
        # Exact top-k of 2**14 elements, kept in full (DropIT paper, §3.3 and §4.1).
        policy = DropIT(
            rate=rate, chunk_size=16_384, selection="top_k", value_dtype=None
        )
        self.assertEqual(config_lib.policy(config), policy)
        self.assertEqual(policy.strategy, "min_k")
        config.layers, config.dropit = "flax", get_defaults().dropit
        self.assertEqual(config, get_defaults())  # and nothing else

    def test_its_fields_can_still_be_overridden(self):
        config = variants.apply(get_defaults(), "paper", paper_rate=0.8)
        config.dropit.chunk_size = None
        config.dropit.value_dtype = "int4"
        policy = config_lib.policy(config)
        self.assertIsNone(policy.chunk_size)
        self.assertEqual(policy.value_dtype, "int4")

    @parameterized.parameters("papers", "Paper", " ")
    def test_others_are_refused(self, name):
        with pytest.raises(ValueError, match=f"no variant '{name}'; known is 'paper'"):
            variants.apply(get_defaults(), name, paper_rate=0.8)


class ConfigsTest(parameterized.TestCase):
    def test_are_all_that_there_are(self):
        files = sorted(path.stem for path in _CONFIGS.glob("*.py"))
        grids = [name for name in files if name.startswith("ablation_")]
        self.assertEqual(grids, ["ablation_cifar10", "ablation_drop"])
        self.assertEqual([name for name in files if name not in grids], [*_NAMES])

    @parameterized.product(name=_NAMES, variant=("", "paper"), num_devices=(1, 2, 8))
    def test_are_valid(self, name, variant, num_devices):
        config = _get(name, variant)
        self.assertIsNone(refusal(config, num_devices))
        config.mesh.fsdp = min(4, num_devices)
        self.assertIsNone(refusal(config, num_devices))

    @parameterized.parameters(*_NAMES)
    def test_drop_what_the_preset_does(self, name):
        config = _get(name)
        self.assertEqual((config.memory, config.layers), ("dropit", "flax"))
        self.assertEqual(set(config.dropit.values()), {"preset"})
        self.assertEqual(config, _get(name, ""))

    @parameterized.parameters(*_NAMES)
    def test_drop_what_the_paper_does(self, name):
        config = _get(name, "paper")
        self.assertEqual((config.memory, config.layers), ("baseline", "dropit"))
        policy = config_lib.policy(config)
        self.assertEqual(policy.rate, 0.9 if "vit" in name else 0.8)
        self.assertEqual((policy.chunk_size, policy.selection), (2**14, "top_k"))
        self.assertIsNone(policy.value_dtype)
        config.memory, config.layers = "dropit", "flax"
        config.dropit = config_lib.dropit_section()
        self.assertEqual(config, _get(name))  # all else is as it was

    @parameterized.parameters(*_NAMES)
    def test_refuse_other_variants(self, name):
        with pytest.raises(ValueError, match="no variant 'deit'; known is 'paper'"):
            _get(name, "deit")

    @parameterized.product(name=tuple(_PAPER), variant=("", "paper"))
    def test_are_the_papers(self, name, variant):
        config, expected = _get(name, variant), _PAPER[name] | _CITED[name]
        found = {field: _value(config, field) for field in expected}
        self.assertEqual(found, expected)
        self.assertEqual(config.seed, 42)

    @parameterized.parameters(("vit_b16_cifar100", 97), ("vit_b16_imagenet", 2502))
    def test_fine_tuning_warms_up_for_500_steps(self, name, steps_per_epoch):
        config = _get(name)
        # An epoch has no half batches: those 500 steps may be a few less.
        epoch, total = config_lib.steps(config)
        self.assertEqual((epoch, total), (steps_per_epoch, config.num_steps))
        warmup = config.schedule.warmup_epochs * epoch
        self.assertBetween(warmup, 495, 501)

    @parameterized.parameters(*_NAMES)
    def test_have_a_model(self, name):
        config = _get(name)
        # The state's shapes: the model takes images of that size, the optimiser all
        # parameters.
        state = step_lib.abstract_state(config)
        classes = data.info(config.dataset).num_classes
        head = state.params["head"]["kernel"]
        self.assertEqual(head.shape[-1], classes)
        self.assertEqual(jax.tree.leaves(state.ema_params), [])

    @parameterized.parameters(*_NAMES)
    def test_can_be_imported_by_their_path(self, name):
        # As `config_flags` does: with the variant after a colon, or nothing.
        signature = inspect.signature(
            importlib.import_module(f"configs.{name}").get_config
        )
        (parameter,) = signature.parameters.values()
        self.assertEqual(parameter.default, "")

    def test_of_a_prepared_dataset_the_examples_are_counted(self):
        config = _get("resnet18_cifar10")
        config.data_dir, config.batch_size = str(tiny.DIRECTORY), 16
        validation.validate(config)
        examples = data.info("cifar10", str(tiny.DIRECTORY)).train_examples
        self.assertLess(examples, 50_000)
        epoch = examples // 16
        self.assertEqual(config_lib.steps(config), (epoch, 30 * epoch))
        config.batch_size = 2 * examples
        with pytest.raises(
            config_lib.ConfigError, match=f"more than the {examples} training"
        ):
            validation.validate(config)


class DefaultsTest(parameterized.TestCase):
    def test_lack_what_a_file_has_to_say_and_nothing_else(self):
        config = get_defaults()
        fields = {
            "dataset": "digits",
            "image_size": 8,
            "batch_size": 16,
            "model": config_lib.model_section("vit_mu", patch_size=2),
            "optimizer.learning_rate": 0.1,
            "num_epochs": 1,
        }
        for name, value in fields.items():
            with pytest.raises(config_lib.ConfigError, match=r"missing|num_epochs or"):
                validation.validate(config)
            *sections, field = name.split(".")
            section = _value(config, ".".join(sections)) if sections else config
            section[field] = value
        validation.validate(config)

    def test_are_new_every_time(self):
        config = get_defaults()
        config.schedule.decay_epochs = (1, 2)
        config.dropit.rate = 0.5
        self.assertEqual(get_defaults().schedule.decay_epochs, ())
        self.assertEqual(get_defaults().dropit.rate, "preset")

    def test_ask_for_nothing_special(self):
        config = get_defaults()
        off = ("label_smoothing", "mixup", "ema_decay", "checkpoint_steps", "workers")
        self.assertEqual({name: config[name] for name in off}, dict.fromkeys(off, 0))
        self.assertEqual((config.dtype, config.memory), ("float32", "baseline"))
        self.assertEqual((config.layers, config.remat), ("flax", "none"))
        self.assertEqual((config.augmentation, config.profile_steps), ("none", ()))
        self.assertEqual(config.accumulate_steps, 1)


class ModelSectionTest(parameterized.TestCase):
    @parameterized.parameters(*models.MODELS)
    def test_has_what_the_model_reads(self, name):
        section = config_lib.model_section(name)
        self.assertIsInstance(section, ConfigDict)
        self.assertEqual(section.name, name)
        self.assertEqual(set(section), {"name", *models.fields(name)})


if __name__ == "__main__":
    absltest.main()
