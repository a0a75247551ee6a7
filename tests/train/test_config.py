import dataclasses
import json

import pytest
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from configs import digits_resnet18
from dropit_jax import PRESETS, DropIT, preset
from train import config as config_lib


def _set(config, name, value):
    *sections, field = name.split(".")
    with config.unlocked(), config.ignore_type():
        section = config
        for part in sections:
            section = section[part]
        section[field] = value


def _delete(config, name):
    *sections, field = name.split(".")
    section = config
    for part in sections:
        section = section[part]
    del section[field]


class ValidateTest(parameterized.TestCase):
    def test_the_shipped_config_is_valid(self):
        config_lib.validate(digits_resnet18.get_config())

    @parameterized.parameters(
        ("datset", "digits", r"config\.datset is not a field.*mean config\.dataset\?"),
        (
            "model.widht",
            8,
            r"config\.model\.widht is not .*mean config\.model\.width\?",
        ),
        ("dropit.ratio", 0.5, r"config\.dropit\.ratio is not .*config\.dropit\.rate\?"),
        ("xyz", 1, r"config\.xyz is not a field that a config has\.$"),
        ("dataset", "mnist", r"config\.dataset: unknown value 'mnist'.*'digits'"),
        ("model.name", "vgg", r"config\.model\.name: unknown value 'vgg'.*'resnet18'"),
        ("model.stem", "7x7", r"config\.model\.stem: .*'7x7'.*'cifar', 'imagenet'"),
        (
            "schedule.name",
            "poly",
            r"config\.schedule\.name: .*'poly'.*'cosine', 'step'",
        ),
        ("batch_size", 0, r"config\.batch_size must be above 0, got 0"),
        ("batch_size", 2.5, r"config\.batch_size must be of type integral, got 2\.5"),
        ("batch_size", True, r"config\.batch_size must be of type integral, got True"),
        ("batch_size", 1438, r"config\.batch_size=1438 is more than the 1437 training"),
        ("batch_size", 129, r"config\.batch_size=129 cannot be split.*2 devices"),
        ("seed", -1, r"config\.seed must not be negative, got -1"),
        ("data_dir", None, r"config\.data_dir must be of type str, got None"),
        (
            "optimizer.learning_rate",
            "0.1",
            r"learning_rate must be of type real, got '0",
        ),
        ("optimizer.learning_rate", -0.1, r"learning_rate must be above 0, got -0\.1"),
        ("optimizer.momentum", float("nan"), r"momentum must be finite, got nan"),
        ("optimizer.nesterov", 1, r"config\.optimizer\.nesterov must be of type bool"),
        ("memory", "slim", r"config\.memory: .*'slim'.*'baseline', 'dropit', 'lean'"),
        ("remat", "all", r"config\.remat: .*'all'.*'none', 'blocks', 'dots'"),
        ("model.patch_size", 4, r"config\.model\.patch_size is not for .*'resnet18'"),
        ("model.name", "vit_b", r"config\.model\.(width|stem) is not for .*'vit_b'"),
        ("dropit.rate", 1.0, r"config\.dropit: DropIT\.rate must be in \[0, 1\)"),
        ("dropit.rate", "high", r"config\.dropit: DropIT\.rate must be a number"),
        (
            "dropit.strategy",
            "max_k",
            r"config\.dropit: DropIT\.strategy: unknown .*'max_k'",
        ),
        ("num_epochs", None, r"config\.num_epochs or config\.num_steps"),
        ("num_steps", 0, r"config\.num_steps must be above 0, got 0"),
        ("seed", 2**63, r"config\.seed must be below 2\*\*63, got 9223372036854775808"),
        ("schedule.name", "step", r"config\.schedule\.decay_epochs is missing"),
        ("schedule.decay_epochs", (3,), r"for config\.schedule\.name='step', got \(3,"),
        ("schedule.decay_epochs", (3, "x"), r"numbers of epochs, got \(3, 'x'\)"),
        ("schedule.decay_epochs", (-3,), r"numbers of epochs, got \(-3,\)"),
        (
            "schedule.warmup_epochs",
            float("inf"),
            r"warmup_epochs must be finite",
        ),
        ("optimizer.learning_rate", float("inf"), r"learning_rate must be finite, got"),
    )
    def test_bad_fields_are_named(self, name, value, message):
        config = digits_resnet18.get_config()
        _set(config, name, value)
        with pytest.raises(config_lib.ConfigError, match=message):
            config_lib.validate(config, num_devices=2)

    @parameterized.parameters("seed", "model.width", "dropit.rate", "schedule.name")
    def test_missing_fields_are_named(self, name):
        config = digits_resnet18.get_config()
        _delete(config, name)
        with pytest.raises(config_lib.ConfigError, match=f"config.{name} is missing"):
            config_lib.validate(config)

    def test_a_run_has_a_length(self):
        config = digits_resnet18.get_config()
        del config.num_epochs
        with pytest.raises(config_lib.ConfigError, match="num_epochs or"):
            config_lib.validate(config)
        config.num_steps = 10
        config_lib.validate(config)

    def test_a_policy_that_nothing_reads_is_an_error(self):
        config = digits_resnet18.get_config()
        config.memory = "baseline"
        config_lib.validate(config)
        config.dropit.rate = 0.5
        with pytest.raises(config_lib.ConfigError, match=r"'baseline' has no policy"):
            config_lib.validate(config)

    def test_a_vision_transformer_has_fields_of_its_own(self):
        config = digits_resnet18.get_config()
        config.model = ConfigDict({"name": "vit_ti"})
        with pytest.raises(config_lib.ConfigError, match=r"patch_size is missing"):
            config_lib.validate(config)
        config.model.patch_size = 8
        config_lib.validate(config)
        config.image_size = 20
        with pytest.raises(config_lib.ConfigError, match=r"=20 cannot be cut .*=8"):
            config_lib.validate(config)


class MemoryTest(parameterized.TestCase):
    @parameterized.product(name=PRESETS, remat=("none", "blocks"))
    def test_is_the_preset(self, name, remat):
        config = digits_resnet18.get_config()
        config.memory, config.remat = name, remat
        self.assertEqual(config_lib.memory(config), preset(name, remat=remat))

    @parameterized.parameters("dropit", "lean")
    def test_its_policies_are_changed_field_by_field(self, name):
        config = digits_resnet18.get_config()
        config.memory = name
        config.dropit.chunk_size = None
        config.dropit.value_dtype = "float16"
        changes = {"chunk_size": None, "value_dtype": "float16"}
        self.assertEqual(config_lib.memory(config), preset(name, **changes))
        policy = dataclasses.replace(preset(name).conv, **changes)
        self.assertEqual(config_lib.memory(config).conv, policy)

    def test_the_section_has_the_policys_fields_and_no_others(self):
        section = config_lib.dropit_section(rate=0.5)
        self.assertEqual(set(section), {f.name for f in dataclasses.fields(DropIT)})
        self.assertEqual((section.rate, section.fill), (0.5, "preset"))
        with pytest.raises(TypeError, match=r"no field 'ratio', but rate, "):
            config_lib.dropit_section(ratio=0.5)


class StepsTest(parameterized.TestCase):
    def test_epochs_leave_out_what_fills_no_batch(self):
        config = digits_resnet18.get_config()
        config.batch_size, config.num_epochs = 100, 3
        self.assertEqual(config_lib.steps(config), (14, 42))

    @parameterized.parameters(True, False)
    def test_steps_count_as_they_are(self, beside_epochs):
        config = digits_resnet18.get_config()
        if not beside_epochs:
            del config.num_epochs
        config.num_steps, config.batch_size = 50, 100
        self.assertEqual(config_lib.steps(config), (14, 50))


class JsonTest(parameterized.TestCase):
    def test_resolves_every_field(self):
        config = digits_resnet18.get_config()
        text = config_lib.to_json(config)
        expected = config.to_dict()
        expected["schedule"]["decay_epochs"] = []  # JSON has no tuples
        self.assertEqual(json.loads(text), expected)
        self.assertEqual(config_lib.differences(text, text), [])

    def test_differences_name_the_fields(self):
        old, new = digits_resnet18.get_config(), digits_resnet18.get_config()
        old.num_epochs = 12
        new.dropit.rate = 0.5
        new.seed = 7
        del new.num_epochs
        new.num_steps = 50
        self.assertEqual(
            config_lib.differences(config_lib.to_json(old), config_lib.to_json(new)),
            [
                "config.dropit.rate: 'preset' -> 0.5",
                "config.num_epochs: 12 -> 'absent'",
                "config.num_steps: None -> 50",
                "config.seed: 42 -> 7",
            ],
        )


if __name__ == "__main__":
    absltest.main()
