import fractions
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from ml_collections import ConfigDict

from configs import (
    ablation_cifar10,
    digits_resnet18,
    digits_vit,
    resnet18_cifar10,
    resnet18_cifar100,
)
from tests.train import fields
from train import data
from train.config import config as config_lib
from train.config import validation


class ValidateTest(parameterized.TestCase):
    @parameterized.parameters(
        ("datset", "digits", r"config\.datset is not a field.*mean config\.dataset\?"),
        (
            "model.widht",
            8,
            r"config\.model\.widht is not .*mean config\.model\.width\?",
        ),
        ("dropit.ratio", 0.5, r"config\.dropit\.ratio is not .*config\.dropit\.rate\?"),
        (
            "xyz",
            1,
            r"config\.xyz is not a field .*config has dataset, .* and \d+ more\.$",
        ),
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
        (
            "memory",
            "slim",
            r"config\.memory: .*'slim'.* 'exact', 'dropit', 'lean'",
        ),
        ("memory", None, r"config\.memory must be of type str, got None"),
        ("layers", "slim", r"config\.layers: .*'slim'; known are 'flax', 'dropit'"),
        ("layers", None, r"config\.layers must be of type str, got None"),
        ("drop", "lean", r"config\.drop is not a field"),
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
        ("seed", 2**32, r"config\.seed must be at most 4,294,967,295, got"),
        ("optimizer", 5, r"config\.optimizer is a section of fields: set the fields"),
        ("schedule.name", "step", r"config\.schedule\.decay_epochs is missing"),
        ("schedule.decay_epochs", (3,), r"for config\.schedule\.name='step', got \(3,"),
        ("schedule.decay_epochs", (3, "x"), r"numbers of epochs, got \(3, 'x'\)"),
        ("schedule.decay_epochs", (True,), r"numbers of epochs, got \(True,\)"),
        ("schedule.decay_epochs", (-3,), r"numbers of epochs, got \(-3,\)"),
        (
            "schedule.warmup_epochs",
            float("inf"),
            r"warmup_epochs must be finite",
        ),
        ("optimizer.learning_rate", float("inf"), r"learning_rate must be finite, got"),
        ("augmentation", "flip", r"\.augmentation: .*'flip'.*'none', 'shift', 'shift_"),
        ("augmentation", "", r"config\.augmentation: unknown value ''; known are"),
        ("augmentation", None, r"config\.augmentation must be of type str, got None"),
        ("normalise", "imagenet", r"\.normalise: .*'imagenet'.*'dataset', 'unit'\."),
        ("normalise", True, r"config\.normalise must be of type str, got True"),
        ("dtype", "float16", r"config\.dtype: .*'float16'.*'float32', 'bfloat16'\."),
        ("dtype", None, r"config\.dtype must be of type str, got None"),
        ("init_from", None, r"config\.init_from must be of type str, got None"),
        ("image_size", 0, r"config\.image_size must be above 0, got 0"),
        ("image_size", 32.0, r"config\.image_size must be of type integral, got 32\.0"),
        ("workers", -1, r"config\.workers must not be negative, got -1"),
        ("workers", 0.5, r"config\.workers must be of type integral, got 0\.5"),
        ("accumulate_steps", 0, r"config\.accumulate_steps must be above 0, got 0"),
        ("accumulate_steps", -2, r"config\.accumulate_steps must be above 0, got -2"),
        ("accumulate_steps", 2.0, r"accumulate_steps must be of type integral, got 2"),
        (
            "accumulate_steps",
            3,
            r"batch_size=64 cannot be split evenly over config\.accumulate_steps=3 "
            r"steps of 2 devices: make it a multiple of 6\.",
        ),
        (
            "accumulate_steps",
            64,  # divides the batch, but not over two devices
            r"over config\.accumulate_steps=64 steps of 2 devices: .* multiple of 128",
        ),
        ("optimizer.clip_norm", -1.0, r"optimizer\.clip_norm must not be negative"),
        ("optimizer.clip_norm", None, r"clip_norm must be of type real, got None"),
        ("optimizer.clip_norm", float("inf"), r"clip_norm must be finite, got inf"),
        ("optimizer.weight_decay", -1e-4, r"weight_decay must not be negative"),
        ("optimizer.momentum", -0.9, r"optimizer\.momentum must be in \[0, 1\)"),
        ("schedule.warmup_epochs", -1.0, r"warmup_epochs must not be negative"),
        ("schedule.decay_epochs", [3], r"decay_epochs must be of type tuple, got \[3"),
        ("schedule.decay_factor", 0.0, r"decay_factor must be above 0, got 0\.0"),
        (
            "schedule.decay_epochs",
            (float("nan"),),
            r"numbers of epochs, got \(nan,\)",
        ),
        ("label_smoothing", -0.1, r"label_smoothing must be in \[0, 1\), got -0\.1"),
        ("label_smoothing", 1.0, r"config\.label_smoothing must be in \[0, 1\), got 1"),
        ("label_smoothing", float("nan"), r"label_smoothing must be finite, got nan"),
        ("label_smoothing", True, r"label_smoothing must be of type real, got True"),
        ("mixup", -0.2, r"config\.mixup must be 0, or at least 1e-06, got -0\.2"),
        ("mixup", float("inf"), r"config\.mixup must be finite, got inf"),
        ("mixup", "0.2", r"config\.mixup must be of type real, got '0\.2'"),
        ("ema_decay", -0.5, r"config\.ema_decay must be in \[0, 1\), got -0\.5"),
        ("ema_decay", 1, r"config\.ema_decay must be in \[0, 1\), got 1"),
        ("evaluate_every", 0, r"config\.evaluate_every must be above 0, got 0"),
        ("evaluate_every", -1.0, r"config\.evaluate_every must be above 0, got -1\.0"),
        ("evaluate_every", None, r"evaluate_every must be of type real, got None"),
        ("checkpoint_steps", -1, r"config\.checkpoint_steps must not be negative"),
        ("checkpoint_steps", 1.5, r"checkpoint_steps must be of type integral, got 1"),
        ("profile_steps", 10, r"config\.profile_steps must be of type tuple, got 10"),
        ("profile_steps", [1, 2], r"profile_steps must be of type tuple, got \[1, 2"),
        ("profile_steps", (10,), r"config\.profile_steps takes the first .*\(10,\)"),
        ("profile_steps", (1, 2, 3), r"such as \(10, 13\), got \(1, 2, 3\)"),
        ("profile_steps", (13, 10), r"config\.profile_steps takes .* got \(13, 10\)"),
        ("profile_steps", (5, 5), r"config\.profile_steps takes .* got \(5, 5\)"),
        ("profile_steps", (-1, 5), r"config\.profile_steps takes .* got \(-1, 5\)"),
        ("profile_steps", (1.0, 5), r"config\.profile_steps takes .* got \(1\.0, 5\)"),
        ("profile_steps", ("1", "5"), r"config\.profile_steps takes .* \('1', '5'\)"),
        ("mesh.data", 0, r"config\.mesh\.data must be above 0, or -1 .* left, got 0"),
        ("mesh.data", -2, r"config\.mesh\.data must be above 0, or -1 .*, got -2"),
        ("mesh.fsdp", 0, r"config\.mesh\.fsdp must be above 0, or -1 .*, got 0"),
        ("mesh.fsdp", -2, r"config\.mesh\.fsdp must be above 0, or -1 .*, got -2"),
        ("mesh.fsdp", None, r"config\.mesh\.fsdp must be of type integral, got None"),
        ("mesh.data", 2.0, r"config\.mesh\.data must be of type integral, got 2\.0"),
        (
            "mesh.data",
            1,
            r"config\.mesh: 1 x 1 devices are asked for, and there are 2\.",
        ),
        ("mesh.data", 4, r"config\.mesh: 4 x 1 devices are asked .*mesh\.data=-1"),
        (
            "mesh.fsdp",
            4,
            r"config\.mesh: -1 x 4 devices are asked for, and there are 2",
        ),
        (
            "mesh.fsdp",
            3,
            r"config\.mesh: -1 x 3 devices are asked for, and there are 2",
        ),
        ("mesh.tensor", 2, r"config\.mesh\.tensor is not a field that a config has"),
        (
            "model.pool",
            "gap",
            r"config\.model\.pool is not for .*'resnet18', which has",
        ),
        ("model.positions", "sincos", r"config\.model\.positions is not for .*'resnet"),
        ("model.dropout", 0.1, r"config\.model\.dropout is not for .*'resnet18'"),
        ("model.drop_path", 0.1, r"config\.model\.drop_path is not for .*'resnet18'"),
        (
            "model.scan",
            True,
            r"config\.model\.scan is not for config\.model\.name='resnet18', which has "
            r"config\.model\.width, config\.model\.stem\.",
        ),
        *(
            (name, 2**31, rf"config\.{name} must be at most ")
            for name in (
                *("image_size", "batch_size", "workers", "num_epochs", "num_steps"),
                *("accumulate_steps", "checkpoint_steps", "evaluate_every"),
                *("model.width", "schedule.warmup_epochs"),
            )
        ),
        *(
            (
                name,
                value,
                rf"{name} must (not be 0|be finite) in a float32, got 1e",
            )
            for name in (
                *("optimizer.learning_rate", "optimizer.clip_norm"),
                *("optimizer.weight_decay", "schedule.decay_factor"),
            )
            for value in (1e-300, 1e300)
        ),
        ("optimizer.momentum", 1e-300, r"momentum must not be 0 in a float32, got"),
        ("evaluate_every", 1e308, r"evaluate_every must be at most 2,147,483,647, got"),
        ("schedule.warmup_epochs", 1e308, r"warmup_epochs must be at most 2,147,483"),
        ("schedule.decay_epochs", (1e308,), r"numbers of epochs, got \(1e\+308,\)"),
        ("mixup", 1e300, r"config\.mixup must be at most 1,000,000"),
        ("mixup", 1e-300, r"config\.mixup must be 0, or at least 1e-06, got 1e-300"),
        ("num_epochs", 10**8, "num_epochs=100000000 takes 2,200,000,000 steps; the"),
        ("profile_steps", (1, 2**40), r"config\.profile_steps takes .* got \(1, 1099"),
        (
            "batch_size",
            np.int64(64),
            r"batch_size must be of type integral, got np.int",
        ),
        ("mixup", np.float32(0.2), r"mixup must be of type real, got np.float32"),
        ("mixup", fractions.Fraction(1, 10), r"must be of type real, got Fraction\(1"),
        ("dropit.rate", np.ones(3), r"config\.dropit: DropIT\.rate must be a number"),
        ("profile_steps", tuple(range(10**5)), r"got \(0, 1, .{40,60} \.\.\. .{50}\.$"),
        ("schedule.decay_epochs", ("x" * 10**6,), r"got \('x+ \.\.\. x+',\)\.$"),
        (
            "dataset",
            "x\x1b[2J" + "y" * 10**6,
            r"unknown value 'x\\x1b\[2Jyyy.* \.\.\. ",
        ),
        ("model", "resnet18", r"config\.model is a section of fields"),
    )
    def test_bad_fields_are_named(self, name, value, message):
        config = digits_resnet18.get_config()
        fields.put(config, name, value)
        with pytest.raises(config_lib.ConfigError, match=message):
            validation.validate(config, num_devices=2)

    @parameterized.parameters(
        ("model.pool", "max", r"config\.model\.pool: .*'max'; known are 'cls', 'gap'"),
        ("model.pool", None, r"config\.model\.pool must be of type str, got None"),
        (
            "model.positions",
            "rotary",
            r"config\.model\.positions: .*'rotary'; known are 'learned', 'sincos'\.",
        ),
        ("model.dropout", -0.1, r"model\.dropout must be in \[0, 1\), got -0\.1"),
        ("model.dropout", 1.0, r"model\.dropout must be in \[0, 1\), got 1\.0"),
        ("model.dropout", False, r"model\.dropout must be of type real, got False"),
        ("model.drop_path", -0.1, r"model\.drop_path must be in \[0, 1\), got -0\.1"),
        ("model.drop_path", 1.5, r"model\.drop_path must be in \[0, 1\), got 1\.5"),
        ("model.drop_path", float("nan"), r"model\.drop_path must be finite, got nan"),
        ("model.scan", 1, r"config\.model\.scan must be of type bool, got 1"),
        ("model.patch_size", 0, r"config\.model\.patch_size must be above 0, got 0"),
        ("model.patch_size", 3, r"image_size=8 cannot be cut .*patch_size=3"),
        ("model.patch_size", 16, r"image_size=8 cannot be cut .*patch_size=16"),
        (
            "model.width",
            64,
            r"config\.model\.width is not for config\.model\.name='vit_mu', which has "
            r"config\.model\.patch_size, .*config\.model\.scan\.",
        ),
        ("model.stem", "cifar", r"config\.model\.stem is not for .*'vit_mu'"),
        ("model.name", "resnet18", r"config\.model\.(width|stem) is missing: 'resnet"),
    )
    def test_bad_fields_of_a_vision_transformer_are_named(self, name, value, message):
        config = digits_vit.get_config()
        fields.put(config, name, value)
        with pytest.raises(config_lib.ConfigError, match=message):
            validation.validate(config)

    @parameterized.parameters(*fields.names(digits_vit.get_config()))
    def test_missing_fields_are_named(self, name):
        config = digits_vit.get_config()
        fields.delete(config, name)
        if name in ("num_steps", "schedule.decay_epochs", "schedule.decay_factor"):
            self.assertIsNone(fields.refusal(config))
            return
        message = rf"config\.{name} is missing"
        if name == "num_epochs":
            message = r"Set config\.num_epochs or config\.num_steps"
        with pytest.raises(config_lib.ConfigError, match=message):
            validation.validate(config)

    @parameterized.parameters("model.width", "model.stem")
    def test_missing_fields_of_a_resnet_are_named(self, name):
        config = digits_resnet18.get_config()
        fields.delete(config, name)
        with pytest.raises(
            config_lib.ConfigError, match=rf"{name} is missing: 'resnet18' needs it"
        ):
            validation.validate(config)

    @parameterized.parameters("schedule.decay_epochs", "schedule.decay_factor")
    def test_what_the_step_schedule_needs_is_named(self, name):
        config = resnet18_cifar100.get_config()
        fields.delete(config, name)
        with pytest.raises(config_lib.ConfigError, match=f"{name} is missing: the ste"):
            validation.validate(config)

    @parameterized.parameters(
        {"augmentation": "resized_crop", "normalise": "unit"},
        {"dtype": "bfloat16", "accumulate_steps": 4},
        {"accumulate_steps": 32},  # of two devices, each has one example
        {"label_smoothing": 0, "mixup": 0, "ema_decay": 0},
        {"label_smoothing": 0.999, "mixup": 8, "ema_decay": 0.9999},
        {"evaluate_every": 1e-9, "checkpoint_steps": 10**9},
        {"evaluate_every": 1000, "workers": 64},
        {"profile_steps": (0, 1)},
        {"profile_steps": (10**6, 10**7)},
        {"optimizer__clip_norm": 1, "optimizer__weight_decay": 0},
        {"mesh__data": 2},
        {"mesh__data": 1, "mesh__fsdp": 2},
        {"mesh__data": 1, "mesh__fsdp": -1},
        {"mesh__fsdp": 2},
        {"init_from": "weights.npz"},
        {"num_steps": 1},
        {"memory": "exact", "layers": "dropit", "remat": "dots"},
        {"memory": "leanest", "remat": "blocks"},
        {"memory": "baseline", "layers": "dropit", "dropit__rate": 0.5},
        {"schedule__warmup_epochs": 10**6},
    )
    def test_the_bounds_are_allowed(self, **values):
        config = fields.changed(digits_resnet18.get_config, **values)
        self.assertIsNone(fields.refusal(config, num_devices=2))

    @parameterized.parameters(
        {"pool": "gap", "positions": "sincos"},
        {"dropout": 0, "drop_path": 0.0},
        {"dropout": 0.99, "drop_path": 0.99},
        {"patch_size": 8, "scan": False},
        {"patch_size": 1},
    )
    def test_the_bounds_of_a_vision_transformer_are_allowed(self, **values):
        config = digits_vit.get_config()
        for name, value in values.items():
            fields.put(config, f"model.{name}", value)
        self.assertIsNone(fields.refusal(config))

    @parameterized.parameters((1, 1000, 8), (2, 1000, 16), (64, 1000, 22), (4, 0, None))
    def test_workers_are_no_more_than_are_of_use(self, cpus, workers, most):
        config = digits_resnet18.get_config()
        config.workers = workers
        with mock.patch.object(validation.os, "cpu_count", return_value=cpus):
            if most is None:
                validation.check_worker_count(config)
                return
            message = (
                f"config.workers=1000 is more than {most}: 8 for each of the {cpus}"
            )
            with pytest.raises(config_lib.ConfigError, match=message):
                validation.check_worker_count(config)
            config.workers = most
            validation.check_worker_count(config)

    @parameterized.parameters(
        ("seed", r"config\.seed must be at most .*, got one int \(Exceeds the limit"),
        ("batch_size", r"at most 2,147,483,647, got one int \(Exceeds the limit"),
        ("mesh.data", r"config\.mesh: one int \(Exceeds the limit"),
        ("optimizer.learning_rate", r"got one int \(Exceeds the limit"),
        ("dropit.rate", r"config\.dropit: "),
    )
    def test_numbers_that_python_does_not_write(self, name, message):
        config = digits_resnet18.get_config()
        fields.put(config, name, 10**5000)
        with pytest.raises(config_lib.ConfigError, match=message):
            validation.validate(config)

    def test_a_grid_is_named_as_one(self):
        with pytest.raises(config_lib.ConfigError, match=r"grid of .*train\.abl"):
            validation.validate(ablation_cifar10.get_config())

    def test_a_run_has_a_length(self):
        config = digits_resnet18.get_config()
        del config.num_epochs
        with pytest.raises(config_lib.ConfigError, match="num_epochs or"):
            validation.validate(config)
        config.num_steps = 10
        self.assertIsNone(fields.refusal(config))

    def test_a_policy_that_nothing_reads_is_an_error(self):
        config = digits_resnet18.get_config()
        config.memory = "lean"
        self.assertIsNone(fields.refusal(config))
        config.dropit.rate = 0.5
        message = r"config\.dropit\.rate is for config\.memory='dropit' or .*'lean'"
        with pytest.raises(config_lib.ConfigError, match=message):
            validation.validate(config)
        config.layers = "dropit"
        self.assertIsNone(fields.refusal(config))

    def test_a_vision_transformer_has_fields_of_its_own(self):
        config = digits_resnet18.get_config()
        config.model = ConfigDict({"name": "vit_ti"})
        with pytest.raises(config_lib.ConfigError, match=r"patch_size is missing"):
            validation.validate(config)
        config.model = config_lib.model_section("vit_ti", patch_size=8)
        self.assertIsNone(fields.refusal(config))
        config.image_size = 20
        with pytest.raises(config_lib.ConfigError, match=r"=20 cannot be cut .*=8"):
            validation.validate(config)

    def test_a_dataset_that_is_damaged_is_told(self):
        config = resnet18_cifar10.get_config()
        with pytest.MonkeyPatch.context() as patch:
            error = data.DataError("it is damaged")
            patch.setattr(data, "info", _raises(error))
            with pytest.raises(data.DataError, match="damaged"):
                validation.validate(config)


def _raises(error):
    def call(*args, **kwargs):
        raise error

    return call


if __name__ == "__main__":
    absltest.main()
