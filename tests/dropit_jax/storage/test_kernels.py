import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dropit_jax import memory
from dropit_jax.memory.compiled import toolchain
from dropit_jax.storage.kernels import definitions
from dropit_jax.storage.kernels.chunk_storage import ChunkStorage, supported
from dropit_jax.storage.kernels.compress import compress
from dropit_jax.storage.kernels.decompress import decompress
from tests import xla_flags
from tests.dropit_jax import reference

_DTYPES = ("float32", "bfloat16", "float16")

# On an NVIDIA GPU the kernels themselves are tested.
_EMULATED = jax.default_backend() != "gpu"

# Chunk size, kept, encoding, value dtype, activation dtype. There are sizes on both
# sides of every limit, whole bytes and parts of them, few kept elements and many.
_CASES = (
    (2, 1, "index", "float32", "float32"),
    (3, 2, "index", "bfloat16", "bfloat16"),
    (16, 2, "index", "float32", "float32"),
    (16, 3, "index", "bfloat16", "float32"),
    (16, 9, "index", "float16", "float16"),
    (24, 5, "index", "bfloat16", "bfloat16"),
    (64, 8, "index", "float32", "float16"),
    (100, 10, "index", "bfloat16", "float32"),
    (1024, 100, "index", "float16", "float16"),
    (2**14, 77, "index", "float32", "float32"),
    (3, 2, "bitmap", "float32", "float32"),
    (16, 2, "bitmap", "bfloat16", "bfloat16"),
    (32, 20, "bitmap", "bfloat16", "float32"),
    (48, 12, "bitmap", "float16", "float16"),
    (256, 25, "bitmap", "float32", "float32"),
    (515, 60, "bitmap", "bfloat16", "bfloat16"),
)

# Targets, and the card for which XLA then writes PTX.
_TARGETS = (("h100", "sm_90a"), ("a100", "sm_80"), ("a5000", "sm_86"))

# Compiles all the kernels as one program for every target, and prints what it takes.
_COMPILER = """
import json, sys
from pathlib import Path
import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from dropit_jax.storage.kernels.compress import compress
from dropit_jax.storage.kernels.decompress import decompress
from dropit_jax.storage.kernels.chunk_storage import ChunkStorage

cases, *targets = json.loads(sys.argv[1])
storages, shapes = [], []
for size, kept, encoding, value_dtype, dtype in cases:
    storage = ChunkStorage(size, kept, encoding, value_dtype)
    storages.append((storage, dtype))
    shapes.append([
        jax.ShapeDtypeStruct((9, 49, 2, last), kind)
        for last, kind in (
            (storage.unit * size, dtype),
            (storage.unit * kept, value_dtype),
            (storage.positions, storage.position_dtype),
        )
    ])

def kernels(args):
    return [
        (
            compress(x, storage),
            decompress(values, positions, storage, dtype),
        )
        for (storage, dtype), (x, values, positions) in zip(storages, args)
    ]

some = jax.sharding.AbstractDevice("NVIDIA A100", None, "gpu")
on_gpu = jax.sharding.get_abstract_mesh().update(abstract_device=some)
for description, directory in targets:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=Path(description).read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("d",))
    device = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda s: s.update(sharding=device), shapes)
    with jax.sharding.use_abstract_mesh(on_gpu):
        lowered = jax.jit(kernels).lower(args)
    compiled = lowered.compile(compiler_options={"xla_dump_to": directory})
    print(compiled.memory_analysis().temp_size_in_bytes)
"""

# Every way that a kernel takes.
_COMPILED = (
    (16, 3, "index", "bfloat16", "float32"),
    (64, 16, "index", "bfloat16", "bfloat16"),
    (16, 2, "bitmap", "bfloat16", "bfloat16"),
    (50, 18, "bitmap", "float32", "float32"),
    (256, 25, "index", "float32", "float32"),
    (100, 10, "bitmap", "float16", "float32"),
)


def _chunks(storage, dtype, shape, seed=0):
    """Chunks of every kind: random, tied, constant, and full of special numbers."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    width = 8 * dtype.itemsize
    infinity = int(np.array(np.inf, dtype).view(f"u{dtype.itemsize}"))
    quiet = infinity | infinity >> 1 | 5  # a NaN with a payload
    positive = [0, 1, 2, infinity, infinity - 1, quiet]
    special = np.array(
        positive + [1 << (width - 1) | x for x in positive], f"u{width // 8}"
    )
    x = rng.normal(size=(math.prod(shape) * storage.unit, storage.size)).astype(dtype)
    kinds = np.arange(len(x)) % 6
    x[kinds == 1] = np.round(x[kinds == 1])
    x[kinds == 2] = 0
    x[kinds == 3] = np.sign(x[kinds == 3])
    strewn = (kinds == 4)[:, None] & (rng.random(x.shape) < 0.5)
    x[strewn] = rng.choice(special, strewn.sum()).view(dtype)
    x[kinds == 5] = np.maximum(x[kinds == 5], 0)
    return jnp.asarray(x.reshape(*shape, storage.unit * storage.size))


def _shape(storage):
    """Rows and units, of which blocks of `storage.size` are no multiple."""
    chunks = 1 if storage.size > 1000 else max(7, 2500 // storage.size)
    return (3, max(1, chunks // storage.unit // 6) | 1, 2)


@functools.lru_cache
def _case(size, kept, encoding, value_dtype, dtype):
    """Returns a storage, chunks, and the results of the definitions for them."""
    storage = ChunkStorage(size, kept, encoding, value_dtype)
    x = _chunks(storage, dtype, _shape(storage))

    kept = jax.jit(functools.partial(definitions.compress, storage=storage))(x)
    # A program of its own: in one, a GPU's compiler leaves out a cast and its reverse.
    whole = functools.partial(definitions.decompress, storage=storage, dtype=dtype)
    return storage, x, kept, jax.jit(whole)(*kept)


def _order(x, storage):
    """The indices kept of each chunk, by Python's stable sort."""
    order = [
        reference.top_k(chunk, storage.kept) for chunk in x.reshape(-1, storage.size)
    ]
    if storage.encoding == "bitmap" or storage.size > 64:
        order = [sorted(indices) for indices in order]
    return np.array(order)


def _packed(order, storage, lead):
    """Positions as they are stored."""
    if storage.encoding == "bitmap":
        mask = np.zeros((len(order), storage.size), bool)
        np.put_along_axis(mask, order, values=True, axis=1)
        packed = np.packbits(mask.reshape(*lead, -1), axis=-1, bitorder="little")
    elif storage.size <= 16:
        pairs = order.reshape(*lead, -1, 2).astype(np.uint8)
        packed = pairs[..., 0] | pairs[..., 1] << 4
    else:
        packed = order.astype(np.uint8 if storage.size <= 256 else np.uint16)
    return packed.reshape(*lead, -1)


def _cast(x, dtype):
    """Casts by XLA, whose casts of NaN differ from NumPy's."""
    if x.dtype == dtype:
        return x
    return jax.jit(lambda x: x.astype(dtype))(x)


class TwinTest(parameterized.TestCase):
    @parameterized.parameters(*_CASES)
    def test_keeps_what_a_stable_sort_puts_first(self, *case):
        storage, x, (values, positions), whole = _case(*case)
        x = np.asarray(x)
        order = _order(x, storage)
        kept = np.take_along_axis(x.reshape(-1, storage.size), order, axis=1)
        kept = _cast(kept, storage.value_dtype)
        reference.assert_same_bits(values, kept.reshape(values.shape))
        reference.assert_same_bits(positions, _packed(order, storage, x.shape[:-1]))
        placed = np.zeros((len(order), storage.size), x.dtype)
        back = _cast(kept, x.dtype)
        np.put_along_axis(placed, order, np.asarray(back), axis=1)
        reference.assert_same_bits(whole, placed.reshape(x.shape))


class KernelTest(parameterized.TestCase):
    @parameterized.parameters(*_CASES)
    def test_compress_is_its_twin(self, *case):
        storage, x, expected, _ = _case(*case)
        kernel = functools.partial(compress, storage=storage, interpret=_EMULATED)
        for one, other in zip(jax.jit(kernel)(x), expected, strict=True):
            reference.assert_same_bits(one, other)

    @parameterized.parameters(*_CASES[::2])
    def test_decompress_is_its_twin(self, *case):
        storage, x, (values, positions), whole = _case(*case)
        args = {"storage": storage, "dtype": x.dtype, "interpret": _EMULATED}
        kernel = functools.partial(decompress, **args)
        reference.assert_same_bits(jax.jit(kernel)(values, positions), whole)

    @parameterized.parameters(((270, 1),), ((2, 3, 5, 1),), ((0, 1),), ((3, 0, 2),))
    def test_any_leading_axes(self, shape):
        storage = ChunkStorage(8, 3, "index", "bfloat16")
        x = _chunks(storage, "float32", shape)

        @jax.jit
        def run(x):
            kept = compress(x, storage, interpret=_EMULATED)
            whole = decompress(*kept, storage, "float16", interpret=_EMULATED)
            expected = definitions.compress(x, storage)
            placed = definitions.decompress(*expected, storage, "float16")
            return (*kept, whole), (*expected, placed)

        actual, expected = run(x)
        for one, other in zip(actual, expected, strict=True):
            reference.assert_same_bits(one, other)


class SupportTest(parameterized.TestCase):
    @parameterized.product(dtype=_DTYPES, value_dtype=_DTYPES)
    def test_floats_of_16_and_32_bits(self, dtype, value_dtype):
        self.assertTrue(supported(dtype, ChunkStorage(16, 2, "index", value_dtype)))
        self.assertTrue(
            supported(jnp.dtype(dtype), ChunkStorage(2**14, 9, "bitmap", value_dtype))
        )

    @parameterized.parameters(
        ("float64", ChunkStorage(16, 2, "index", "float32")),
        ("int32", ChunkStorage(16, 2, "index", "float32")),
        ("float32", ChunkStorage(16, 2, "index", "float64")),
        ("float32", ChunkStorage(16, 2, "index", "int8")),
        ("float32", ChunkStorage(16, 2, "auto", "float32")),
        ("float32", ChunkStorage(1, 1, "index", "float32")),
        ("float32", ChunkStorage(16, 0, "index", "float32")),
        ("float32", ChunkStorage(16, 16, "index", "float32")),
        ("float32", ChunkStorage(2**14 + 1, 16, "index", "float32")),
        ("float32", ChunkStorage(2**17, 16, "index", "float32")),
    )
    def test_nothing_else(self, dtype, storage):
        self.assertFalse(supported(dtype, storage))
        if dtype == "float64":
            return  # JAX has none here.
        x = jax.ShapeDtypeStruct((1, storage.unit * storage.size), dtype)
        with pytest.raises(ValueError, match="There is no kernel for"):
            jax.eval_shape(functools.partial(compress, storage=storage), x)

    def test_shapes_are_the_plans(self):
        storage = ChunkStorage(16, 3, "index", "float32")  # 2 chunks a unit
        x = jnp.zeros((4, 16))
        with pytest.raises(ValueError, match=r"\(\.\.\., units, 32\), not \(4, 16\)"):
            compress(x, storage, interpret=_EMULATED)
        values, positions = jnp.zeros((4, 6)), jnp.zeros((4, 3), jnp.uint8)
        whole = decompress(values, positions, storage, "float32", interpret=_EMULATED)
        self.assertEqual(whole.shape, (4, 32))
        for wrong in (
            (values[:, :5], positions),
            (values, positions[:, :2]),
            (values, positions.astype(jnp.uint16)),
        ):
            with pytest.raises(ValueError, match=r"are .*, not "):
                decompress(*wrong, storage, "float32", interpret=_EMULATED)

    def test_no_array_that_pallas_cannot_address(self):
        storage = ChunkStorage(64, 63, "index", "float32")
        x = jax.ShapeDtypeStruct((2**25, 64), jnp.float32)
        shapes = jax.eval_shape(functools.partial(compress, storage=storage), x)
        self.assertEqual(shapes[1].shape, (2**25, 63))
        x = jax.ShapeDtypeStruct((2**26, 64), jnp.float32)
        with pytest.raises(ValueError, match="no kernel for 67108864 units"):
            jax.eval_shape(functools.partial(compress, storage=storage), x)


class CompileTest(parameterized.TestCase):
    @parameterized.parameters(*_TARGETS)
    def test_becomes_ptx_without_temporaries(self, target, card):
        ptx, temp_bytes = _compiled()[target]
        self.assertIn(f".target {card}", ptx)
        for name in ("compress", "decompress"):
            entries = re.findall(rf"\.entry dropit_{name}[_\d]*\(", ptx)
            self.assertLen(entries, len(_COMPILED))
        self.assertNotIn(".local", ptx)
        # For each compression a table of pointers to its results, at 256 bytes from the
        # one before. Every array is larger than them all.
        self.assertLessEqual(temp_bytes, 256 * len(_COMPILED))


@functools.lru_cache
def _compiled():
    """The PTX of all kernels and the bytes of temporaries, for each target."""
    flags = f"--xla_gpu_autotune_level=0 {xla_flags.KEEP_PTX}"
    environment = toolchain.find().environment(flags)
    names = [name for name, _ in _TARGETS]
    with tempfile.TemporaryDirectory() as parent:
        directories = [Path(parent, name) for name in names]
        targets = [
            (str(memory.target_path(name)), str(directory))
            for name, directory in zip(names, directories, strict=True)
        ]
        done = subprocess.run(
            [sys.executable, "-c", _COMPILER, json.dumps([_COMPILED, *targets])],
            env=environment,
            capture_output=True,
            check=False,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        ptx = [
            "".join(file.read_text() for file in directory.glob("*.ptx"))
            for directory in directories
        ]
    temp_bytes = map(int, done.stdout.split())
    return dict(zip(names, zip(ptx, temp_bytes, strict=True), strict=True))


if __name__ == "__main__":
    absltest.main()
