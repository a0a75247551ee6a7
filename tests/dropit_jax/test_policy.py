import dataclasses
import fractions
import math

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import DropIT


class DropITTest(parameterized.TestCase):
    def test_defaults(self):
        self.assertEqual(
            dataclasses.asdict(DropIT()),
            {
                "rate": 0.875,
                "strategy": "min_k",
                "granularity": "element",
                "chunk_size": 16,
                "encoding": "auto",
                "selection": "auto",
                "value_dtype": None,
                "group_size": 64,
                "rounding": "nearest",
                "fill": "zero",
            },
        )

    def test_is_frozen_and_compares_and_hashes_by_value(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            DropIT().rate = 0.5
        self.assertEqual(DropIT(rate=0), DropIT(rate=np.float64(0.0)))
        self.assertEqual(hash(DropIT(rate=0)), hash(DropIT(rate=0.0)))
        self.assertNotEqual(DropIT(rate=0.5), DropIT(rate=0.25))

    def test_dtype_objects_are_taken_by_name(self):
        self.assertEqual(
            DropIT(value_dtype=jnp.bfloat16), DropIT(value_dtype="bfloat16")
        )
        self.assertEqual(DropIT(value_dtype=jnp.int4), DropIT(value_dtype="int4"))

    @parameterized.parameters(
        ({"rate": 1.0}, ValueError, r"DropIT\.rate must be in \[0, 1\), got 1\.0"),
        ({"rate": -0.1}, ValueError, r"DropIT\.rate .* got -0\.1"),
        ({"rate": math.nan}, ValueError, r"DropIT\.rate .* got nan"),
        ({"fill": "x" * 10**6}, ValueError, r"DropIT\.fill: .*x\.\.\.x.*'zero'"),
        ({"rate": 10**400}, ValueError, r"DropIT\.rate .* got 1000.*\.\.\."),
        ({"rate": np.array([0.5])}, TypeError, r"DropIT\.rate must be a number"),
        ({"chunk_size": np.array([16])}, TypeError, r"DropIT\.chunk_size .* got array"),
        ({"group_size": np.array([16])}, TypeError, r"DropIT\.group_size .* got array"),
        ({"rate": "0.5"}, TypeError, r"DropIT\.rate must be a number, got '0\.5'"),
        ({"rate": True}, TypeError, r"DropIT\.rate .* got True"),
        ({"rate": None}, TypeError, r"DropIT\.rate .* got None"),
        ({"chunk_size": 0}, ValueError, r"DropIT\.chunk_size .* got 0"),
        ({"chunk_size": -16}, ValueError, r"DropIT\.chunk_size .* got -16"),
        ({"chunk_size": 16.0}, TypeError, r"DropIT\.chunk_size .* got 16\.0"),
        ({"chunk_size": True}, TypeError, r"DropIT\.chunk_size .* got True"),
        ({"strategy": "max_k"}, ValueError, r"strategy.*'max_k'.*'min_k', 'random'"),
        (
            {"granularity": "row"},
            ValueError,
            r"granularity.*'row'.*'element', 'channel'",
        ),
        (
            {"encoding": "rle"},
            ValueError,
            r"encoding.*'rle'.*'auto', 'index', 'bitmap'",
        ),
        (
            {"selection": "sort"},
            ValueError,
            r"selection.*'sort'.*'auto', 'xla', 'top_k'",
        ),
        ({"value_dtype": "int3"}, ValueError, r"value_dtype.*'int3'.*None, 'bfloat16'"),
        ({"value_dtype": 7}, ValueError, r"value_dtype.*7.*None, 'bfloat16'"),
        ({"fill": "one"}, ValueError, r"fill.*'one'.*'zero', 'mean'"),
        ({"strategy": ["min_k"]}, ValueError, r"strategy.*\['min_k'\]"),
        ({"group_size": 0}, ValueError, r"DropIT\.group_size .* got 0"),
        ({"group_size": -1}, ValueError, r"DropIT\.group_size .* got -1"),
        ({"group_size": 64.0}, TypeError, r"DropIT\.group_size .* got 64\.0"),
        ({"group_size": None}, TypeError, r"DropIT\.group_size .* got None"),
        ({"group_size": True}, TypeError, r"DropIT\.group_size .* got True"),
        ({"rounding": "up"}, ValueError, r"rounding.*'up'.*'nearest', 'stochastic'"),
        (
            {"granularity": "channel", "encoding": "bitmap"},
            ValueError,
            r"encoding='bitmap'.*granularity='channel'",
        ),
        ({"rounding": "stochastic"}, ValueError, r"'int2', got value_dtype=None"),
        (
            {"rounding": "stochastic", "value_dtype": "bfloat16"},
            ValueError,
            r"'int8', 'int4'.*got value_dtype='bfloat16'",
        ),
    )
    def test_bad_values_are_named(self, fields, error, message):
        with pytest.raises(error, match=message):
            DropIT(**fields)

    @parameterized.parameters(
        {"strategy": "random"},
        {"strategy": "random", "encoding": "bitmap", "chunk_size": None},
        {"granularity": "channel"},
        {"granularity": "channel", "encoding": "index", "strategy": "random"},
        {"value_dtype": "int8", "group_size": np.int64(1)},
        {"value_dtype": "int4", "rounding": "stochastic", "rate": 0.0},
        {"value_dtype": "int2", "fill": "mean"},
    )
    def test_values_that_go_together(self, **fields):
        policy = DropIT(**fields)
        for field, value in fields.items():
            self.assertEqual(getattr(policy, field), value)
        self.assertIs(type(policy.group_size), int)

    @parameterized.parameters(
        (None, None),
        ("bfloat16", None),
        ("float16", None),
        ("int8", 8),
        ("int4", 4),
        ("int2", 2),
    )
    def test_code_bits(self, value_dtype, bits):
        self.assertEqual(DropIT(value_dtype=value_dtype).code_bits, bits)

    @parameterized.parameters(
        ({}, False),
        ({"strategy": "random"}, True),
        ({"granularity": "channel", "strategy": "random"}, True),
        ({"value_dtype": "int4"}, False),
        ({"value_dtype": "int4", "rounding": "stochastic"}, True),
        ({"granularity": "channel", "fill": "mean"}, False),
    )
    def test_needs_key(self, fields, needed):
        self.assertIs(DropIT(**fields).needs_key, needed)

    @parameterized.parameters(
        ({}, False),
        ({"strategy": "random", "value_dtype": "int4"}, False),
        ({"granularity": "channel"}, True),
        ({"fill": "mean"}, True),
    )
    def test_per_channel(self, fields, expected):
        self.assertIs(DropIT(**fields).per_channel, expected)

    @parameterized.parameters(
        *("strategy", "granularity", "encoding", "selection", "rounding", "fill")
    )
    def test_arrays_are_no_choices(self, field):
        default = getattr(DropIT(), field)
        for value in (np.array([default]), np.array(default), [default], {}):
            with pytest.raises(ValueError, match=rf"DropIT\.{field}: unknown value"):
                DropIT(**{field: value})

    def test_unknown_fields_are_named(self):
        with pytest.raises(TypeError, match="chunk"):
            DropIT(chunk=16)

    def test_kept_counts_are_those_of_exact_arithmetic(self):
        for thousandths in range(0, 1000, 5):
            rate = thousandths / 1000
            share = 1 - fractions.Fraction(thousandths, 1000)
            for size in (1, 2, 3, 7, 8, 10, 16, 17, 64, 100, 1000, 2**14, 10**7):
                expected = max(1, math.floor(share * size))
                self.assertEqual(DropIT(rate).kept(size), expected, (rate, size))

    def test_kept_counts_at_rates_that_are_no_decimals(self):
        self.assertEqual(DropIT(1 - 1 / 3).kept(3), 1)
        self.assertEqual(DropIT(1 - 1 / 3).kept(9), 3)
        self.assertEqual(DropIT(2 / 3).kept(9), 3)


if __name__ == "__main__":
    absltest.main()
