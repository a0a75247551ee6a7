import dataclasses
import functools
import json

import pytest
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

import dropit_jax
from configs import (
    digits_resnet18,
    digits_vit,
    resnet18_cifar10,
    resnet18_cifar100,
    resnet18_imagenet,
    vit_b16_cifar100,
    vit_b16_imagenet,
    vit_ti16_cifar10,
)
from dropit_jax import PRESETS, DropIT
from tests.train import fields
from train import models
from train.config import config as config_lib
from train.config import validation
from train.models import layers

_CONFIGS = (
    *(digits_resnet18, digits_vit),
    *(resnet18_cifar10, resnet18_cifar100, resnet18_imagenet),
    *(vit_b16_cifar100, vit_b16_imagenet, vit_ti16_cifar10),
)


class ModelSectionTest(parameterized.TestCase):
    @parameterized.parameters(*models.MODELS)
    def test_what_is_not_given_is_the_models(self, name):
        section = config_lib.model_section(name)
        self.assertEqual(section.to_dict(), {"name": name} | models.defaults(name))
        fields = {field: section[field] for field in models.fields(name)}
        self.assertEqual(models.create(name, 10, **fields), models.create(name, 10))

    def test_what_is_given_is_as_it_is_given(self):
        section = config_lib.model_section("vit_b", patch_size=4, scan=True)
        self.assertEqual(
            section.to_dict(),
            {
                "name": "vit_b",
                "patch_size": 4,
                "pool": "cls",
                "positions": "learned",
                "dropout": 0.0,
                "drop_path": 0.0,
                "scan": True,
            },
        )

    def test_other_models_are_refused(self):
        with pytest.raises(ValueError, match=r"unknown value 'vgg'.*'resnet18'"):
            config_lib.model_section("vgg")

    @parameterized.parameters(
        ("resnet18", "patch_size", r"but width, stem\.$"),
        ("vit_b", "width", r"but patch_size, pool, positions, .*, scan\.$"),
        ("vit_b", "num_layers", "but patch_size"),
        ("resnet50", "layers", "but width"),
        ("resnet50", "block", "but width"),
    )
    def test_other_fields_are_refused(self, model, field, message):
        with pytest.raises(
            TypeError, match=rf"of '{model}' has no field '{field}', {message}"
        ):
            config_lib.model_section(model, **{field: 1})


# The policy of the preset "dropit" where a config changes nothing.
_POLICY = DropIT(value_dtype="bfloat16")


class PresetTest(parameterized.TestCase):
    @parameterized.parameters(*PRESETS)
    def test_is_the_librarys(self, name):
        config = digits_resnet18.get_config()
        config.memory = name
        self.assertEqual(config_lib.preset(config), dropit_jax.preset(name))

    def test_of_the_baseline_there_is_none(self):
        config = digits_resnet18.get_config()
        config.memory = "baseline"
        self.assertIsNone(config_lib.preset(config))

    def test_has_the_policy_of_the_config(self):
        config = digits_resnet18.get_config()
        config.dropit.update(rate=0.5, value_dtype=None)
        expected = dropit_jax.preset("dropit", kernel=DropIT(rate=0.5))
        self.assertEqual(config_lib.preset(config), expected)
        self.assertFalse(config_lib.preset(config).needs_key)
        config.dropit.strategy = "random"
        self.assertTrue(config_lib.preset(config).needs_key)


class PolicyTest(parameterized.TestCase):
    def test_is_the_presets(self):
        self.assertEqual(config_lib.policy(digits_resnet18.get_config()), _POLICY)

    def test_is_changed_field_by_field(self):
        config = digits_resnet18.get_config()
        config.dropit.chunk_size = None
        config.dropit.value_dtype = "float16"
        expected = DropIT(chunk_size=None, value_dtype="float16")
        self.assertEqual(config_lib.policy(config), expected)

    @parameterized.parameters(
        ("baseline", "flax", False),
        ("lean", "flax", False),
        ("dropit", "flax", True),
        ("baseline", "dropit", True),
        ("exact", "dropit", True),
    )
    def test_is_used_by_the_preset_and_the_layers(self, memory, layers, expected):
        config = digits_resnet18.get_config()
        config.memory, config.layers = memory, layers
        self.assertEqual(config_lib.uses_policy(config), expected)

    def test_the_section_has_the_policys_fields_and_no_others(self):
        section = config_lib.dropit_section(rate=0.5)
        self.assertEqual(set(section), {f.name for f in dataclasses.fields(DropIT)})
        self.assertEqual((section.rate, section.fill), (0.5, "preset"))
        with pytest.raises(TypeError, match=r"no field 'ratio', but rate, "):
            config_lib.dropit_section(ratio=0.5)


class LayersTest(parameterized.TestCase):
    def test_are_flaxs_or_those_of_the_policy(self):
        config = digits_resnet18.get_config()
        config.dropit.rate = 0.5
        self.assertIs(config_lib.model_layers(config), layers.FLAX)
        config.layers = "dropit"
        policy = DropIT(rate=0.5, value_dtype="bfloat16")
        self.assertEqual(config_lib.model_layers(config), layers.dropit(policy))


class PlainTest(parameterized.TestCase):
    def test_nothing_saves_memory(self):
        config = digits_resnet18.get_config()
        config.memory, config.layers, config.remat = "lean", "dropit", "blocks"
        config.dropit.rate = 0.5
        plain = config_lib.plain(config)
        self.assertIsNone(config_lib.preset(plain))
        self.assertIs(config_lib.model_layers(plain), layers.FLAX)
        self.assertEqual(plain.remat, "none")
        self.assertFalse(config_lib.uses_policy(plain))
        self.assertEqual(set(plain.dropit.values()), {"preset"})
        # The config itself is as it was.
        self.assertEqual((config.layers, config.dropit.rate), ("dropit", 0.5))


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


# A config in which nothing is as `get_defaults` has it.
_CHANGED = functools.partial(
    fields.changed,
    resnet18_cifar100.get_config,
    profile_steps=(10, 13),
    schedule__decay_epochs=(0.5, 3, 7.25),
    dropit__chunk_size=None,
    dropit__value_dtype="int4",
    dropit__rate=0.1 + 0.2,  # has many digits
    num_epochs=None,
    num_steps=2**31 - 1,
    seed=2**32 - 1,
    layers="dropit",
    init_from='with "quotes", a line\nand ü',
)


class JsonTest(parameterized.TestCase):
    def test_resolves_every_field(self):
        config = digits_resnet18.get_config()
        text = config_lib.to_json(config)
        expected = config.to_dict()
        expected["schedule"]["decay_epochs"] = []  # JSON has no tuples
        expected["profile_steps"] = []
        self.assertEqual(json.loads(text), expected)
        self.assertEqual(config_lib.differences(text, text), [])

    @parameterized.parameters(
        _CHANGED,
        *(
            functools.partial(module.get_config, variant)
            for module in _CONFIGS
            for variant in ("", "paper")
        ),
    )
    def test_is_read_back(self, get_config):
        config = get_config()
        text = config_lib.to_json(config)
        found = config_lib.from_json(text)
        self.assertEqual(found, config)
        self.assertEqual(found.to_dict(), config.to_dict())  # tuples among them
        self.assertEqual(config_lib.to_json(found), text)
        self.assertEqual(config_lib.differences(text, config_lib.to_json(found)), [])
        self.assertIsNone(fields.refusal(found))
        self.assertEqual(config_lib.policy(found), config_lib.policy(config))
        self.assertEqual(config_lib.steps(found), config_lib.steps(config))

    @parameterized.parameters(
        ("", "Not JSON: Expecting value"),
        ("{", "Not JSON: Expecting property name"),
        ('{"a": 1', "Not JSON: Expecting ',' delimiter"),
        ('{"seed": 1} x', "Not JSON: Extra data"),
        ("[]", r"Not a JSON object\."),
        ("[" * 100_000, r"Not JSON: "),
        ('{"seed": ' + "9" * 5000 + "}", r"Not JSON: "),
        ('{"__class__": 1}', "Not a config: "),
        ('{"a": ' * 100_000, r"Not JSON: "),
        ("3", r"Not a JSON object\."),
        ("null", r"Not a JSON object\."),
        ('"seed"', r"Not a JSON object\."),
        ('{"model.name": "vit_b"}', "Not a config: .*model.name"),
    )
    def test_other_text_is_an_error(self, text, message):
        with pytest.raises(config_lib.ConfigError, match=message):
            config_lib.from_json(text)

    @parameterized.parameters(
        ("{}", r"Set config\.num_epochs or config\.num_steps"),
        ('{"datset": "digits"}', r"config\.datset is not a field"),
        ('{"model": {"name": []}}', "num_epochs or"),
    )
    def test_another_object_is_no_valid_config(self, text, message):
        with pytest.raises(config_lib.ConfigError, match=message):
            validation.validate(config_lib.from_json(text))

    @given(
        st.dictionaries(
            st.text("abc", min_size=1, max_size=3),
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
        )
    )
    def test_any_section_is_read_back(self, values):
        config = ConfigDict({"section": values})
        found = config_lib.from_json(config_lib.to_json(config))
        self.assertEqual(found.to_dict(), config.to_dict())


class MigrationTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"memory": "baseline"}, ("baseline", "flax")),
        ({"memory": "dropit"}, ("baseline", "dropit")),
        ({"memory": "dropit", "drop": ""}, ("baseline", "dropit")),
        ({"memory": "dropit", "drop": "exact"}, ("exact", "dropit")),
        ({"memory": "baseline", "drop": "lean"}, ("lean", "flax")),
        ({"memory": "lean", "drop": ""}, ("baseline", "flax")),
        ({"memory": "lean", "layers": "dropit"}, ("lean", "dropit")),
    )
    def test_a_config_of_an_early_run_is_read(self, fields, expected):
        found = config_lib.from_json(json.dumps(fields | {"seed": 1}))
        memory, layers = expected
        self.assertEqual(
            found.to_dict(), {"memory": memory, "layers": layers, "seed": 1}
        )

    def test_fields_that_nothing_reads_any_more_are_reset(self):
        old = {"memory": "lean", "dropit": {"rate": 0.5}}
        found = config_lib.from_json(json.dumps(old))
        self.assertEqual(found.dropit.rate, "preset")

    def test_a_run_of_layers_that_are_gone_does_not_go_on(self):
        with pytest.raises(
            config_lib.ConfigError, match="layers 'lean' of an early version"
        ):
            config_lib.check_can_go_on('{"memory": "lean", "drop": ""}')
        config_lib.check_can_go_on('{"memory": "lean", "layers": "flax"}')
        config_lib.check_can_go_on('{"memory": "dropit", "drop": ""}')


class DifferencesTest(parameterized.TestCase):
    def test_name_the_fields(self):
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

    @parameterized.parameters(*fields.names(digits_resnet18.get_config()))
    def test_are_all_but_those_that_change_no_result(self, name):
        old, new = digits_resnet18.get_config(), digits_resnet18.get_config()
        fields.put(new, name, "another")
        found = config_lib.differences(config_lib.to_json(old), config_lib.to_json(new))
        free = ("data_dir", "workers", "checkpoint_steps", "profile_steps")
        if name in free or name.startswith("mesh."):
            self.assertEqual(found, [])
        else:
            (line,) = found
            self.assertStartsWith(line, f"config.{name}: ")
            self.assertEndsWith(line, " -> 'another'")

    def test_are_none_between_what_is_resumed_elsewhere(self):
        new = fields.changed(
            digits_resnet18.get_config,
            data_dir="elsewhere",
            workers=8,
            checkpoint_steps=100,
            profile_steps=(10, 13),
        )
        old = config_lib.to_json(digits_resnet18.get_config())
        self.assertEqual(config_lib.differences(old, config_lib.to_json(new)), [])

    def test_of_sections_are_those_of_their_fields(self):
        old = digits_resnet18.get_config()
        new = fields.changed(
            digits_resnet18.get_config,
            model=config_lib.model_section("vit_mu", patch_size=8, scan=True),
        )
        self.assertEqual(
            config_lib.differences(config_lib.to_json(old), config_lib.to_json(new)),
            [
                "config.model.drop_path: 'absent' -> 0.0",
                "config.model.dropout: 'absent' -> 0.0",
                "config.model.name: 'resnet18' -> 'vit_mu'",
                "config.model.patch_size: 'absent' -> 8",
                "config.model.pool: 'absent' -> 'cls'",
                "config.model.positions: 'absent' -> 'learned'",
                "config.model.scan: 'absent' -> True",
                "config.model.stem: 'cifar' -> 'absent'",
                "config.model.width: 16 -> 'absent'",
            ],
        )


if __name__ == "__main__":
    absltest.main()
