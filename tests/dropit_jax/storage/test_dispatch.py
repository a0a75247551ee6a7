"""Where kernels run, and that they move nothing between devices."""

import collections
import dataclasses
import functools
import itertools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dropit_jax
from dropit_jax import DropIT
from dropit_jax.storage.kernels import definitions, dispatch
from dropit_jax.storage.kernels.chunk_storage import ChunkStorage
from dropit_jax.storage.kernels.compress import compress
from dropit_jax.storage.kernels.decompress import decompress
from dropit_jax.xla.partitioning import on_every_device
from tests.dropit_jax import gpu_programs, reference

_STORAGE = ChunkStorage(16, 3, "index", "bfloat16")
_SHAPE = (8, 2, 4, _STORAGE.unit * 16)
_SPECS = (
    P("data"),
    P("data", None, "model"),
    P(("data", "model")),
    P(None, "model", "data"),
)
_MOVES = re.compile(r" (all-\w+|reduce-scatter|collective-permute)(-start)?\(")

# Emulated, and otherwise as on a GPU.
_compress = on_every_device(
    functools.partial(compress, storage=_STORAGE, interpret=True), 2
)
_decompress = on_every_device(
    functools.partial(decompress, storage=_STORAGE, dtype="float32", interpret=True), 1
)


def _round_trip(x):
    values, positions = _compress(x)
    return values, positions, _decompress(values, positions)


@jax.jit
def _expected(x):
    values, positions = definitions.compress(x, _STORAGE)
    return (
        values,
        positions,
        definitions.decompress(values, positions, _STORAGE, "float32"),
    )


def _mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


class MeshTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.x = jnp.asarray(reference.activation(0, _SHAPE))

    def assert_as_the_twins(self, results):
        for result, expected in zip(results, _expected(self.x), strict=True):
            reference.assert_same_bits(np.asarray(result), np.asarray(expected))

    @parameterized.parameters(
        (_SPECS[0], AxisType.Auto),
        (_SPECS[1], AxisType.Explicit),
        (_SPECS[2], AxisType.Auto),
        (_SPECS[3], AxisType.Explicit),
    )
    def test_each_device_computes_its_part(self, spec, axis_type):
        mesh = _mesh(axis_type)
        with jax.set_mesh(mesh):
            x = jax.device_put(self.x, NamedSharding(mesh, spec))
            step = jax.jit(_round_trip).lower(x).compile()
            results = step(x)
        self.assertIsNone(_MOVES.search(step.as_text()))
        for result in results:
            self.assertTrue(result.sharding.is_equivalent_to(x.sharding, result.ndim))
        self.assert_as_the_twins(results)

    def test_without_a_mesh_in_force(self):
        sharding = NamedSharding(_mesh(AxisType.Auto), P("data"))
        x = jax.device_put(self.x, sharding)
        step = jax.jit(_round_trip).lower(x).compile()
        self.assertIsNone(_MOVES.search(step.as_text()))
        self.assert_as_the_twins(step(x))

    def test_chunks_on_several_devices_come_together(self):
        sharding = NamedSharding(_mesh(AxisType.Auto), P(None, None, None, "model"))
        self.assert_as_the_twins(jax.jit(_round_trip)(jax.device_put(self.x, sharding)))

    @parameterized.parameters(
        (AxisType.Auto, P(None, None, "model")),
        (AxisType.Explicit, P("model", None, None)),
    )
    def test_devices_may_have_an_odd_number_of_chunks(self, axis_type, spec):
        mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
        x = jnp.asarray(reference.activation(0, (8, 3, 8 * 3 * 16)))

        @jax.jit
        def round_trip(x):
            return dropit_jax.compress(x, DropIT(chunk_size=16)).decompress()

        expected = np.asarray(round_trip(x))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(x, NamedSharding(mesh, spec))
            step = round_trip.lower(sharded).compile()
            result = step(sharded)
        self.assertIsNone(_MOVES.search(step.as_text()))
        reference.assert_same_bits(np.asarray(result), expected)

    def test_within_shard_map(self):
        spec = P("data", "model")
        mapped = jax.shard_map(
            _round_trip,
            mesh=_mesh(AxisType.Auto),
            in_specs=spec,
            out_specs=spec,
            check_vma=False,  # which emulated kernels do not pass
        )
        self.assert_as_the_twins(jax.jit(mapped)(self.x))

    def test_kernels_differ_by_device_within_shard_map(self):
        policy, spec = DropIT(), P("data", "model")

        def round_trip(x):
            return dropit_jax.compress(x, policy).decompress()

        mesh = _mesh(AxisType.Auto)
        mapped = jax.shard_map(round_trip, mesh=mesh, in_specs=spec, out_specs=spec)
        traced = jax.jit(mapped).trace(self.x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        self.assertEqual(text.count("xla.gpu.triton"), 2)
        result = jax.jit(mapped)(self.x)
        np.testing.assert_array_equal(result, jax.jit(round_trip)(self.x))

    @parameterized.parameters(0, 2)
    def test_vmap(self, axis):
        self.assert_as_the_twins(jax.jit(jax.vmap(_round_trip, axis, axis))(self.x))

    def test_vmap_of_one_operand(self):
        @jax.jit
        def run(x):
            values, positions = definitions.compress(x, _STORAGE)
            one = jnp.broadcast_to(values[0], values.shape)
            return (
                jax.vmap(_decompress, (None, 0))(values[0], positions),
                definitions.decompress(one, positions, _STORAGE, "float32"),
            )

        whole, expected = run(self.x)
        np.testing.assert_array_equal(whole, expected)


class _Traced(Exception):
    """A kernel was traced."""


class PlatformTest(parameterized.TestCase):
    def lowered(self, platform, **fields):
        policy = DropIT(**fields)

        def round_trip(x):
            return dropit_jax.compress(x, policy).decompress()

        x = jax.ShapeDtypeStruct((4, 2**15), jnp.float32)
        traced = jax.jit(round_trip).trace(x)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    @parameterized.parameters(
        {}, {"chunk_size": 64}, {"chunk_size": 2**14}, {"encoding": "bitmap"}
    )
    def test_a_gpu_has_kernels(self, **fields):
        self.assertEqual(self.lowered("cuda", **fields).count("xla.gpu.triton"), 2)

    @parameterized.parameters("cpu", "tpu", "rocm")
    def test_others_have_none(self, platform):
        self.assertNotIn("triton", self.lowered(platform))

    @parameterized.parameters(
        {"selection": "xla"},
        {"selection": "top_k"},
        {"chunk_size": 2**14 - 1},
        {"chunk_size": 2**15},
    )
    def test_no_kernel_is_asked_for(self, **fields):
        self.assertNotIn("triton", self.lowered("cuda", **fields))

    def test_no_kernel_is_asked_for_more_than_it_can_address(self):
        x = jax.ShapeDtypeStruct((2**31, 2 * 16), jnp.float32)
        traced = jax.jit(lambda x: dropit_jax.compress(x, DropIT())).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        self.assertNotIn("triton", text)

    def test_random_elements_are_chosen_without_a_kernel(self):
        policy = DropIT(strategy="random")
        x = jax.ShapeDtypeStruct((4, 2**14), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        traced = jax.jit(lambda x, key: dropit_jax.compress(x, policy, key))
        text = traced.trace(x, key).lower(lowering_platforms=("cuda",)).as_text()
        self.assertNotIn("triton", text)

    def test_kernels_are_traced_for_a_gpu_alone(self):
        size = 16 * 17  # of a shape that nothing else here has: JAX keeps traces
        with mock.patch.object(dispatch, "_compress_kernel", side_effect=_Traced):
            x = jax.ShapeDtypeStruct((3, size), jnp.float32)
            traced = jax.jit(lambda x: dropit_jax.compress(x, DropIT())).trace(x)
            traced.lower(lowering_platforms=("cpu",))
            with pytest.raises(_Traced):
                traced.lower(lowering_platforms=("cuda",))

    def test_decompression_is_differentiable(self):
        x, weights = np.random.default_rng(1).normal(size=(2, 4, 64)).astype("float32")
        residual = jax.jit(lambda x: dropit_jax.compress(x, DropIT()))(x)

        @jax.jit
        @jax.grad
        def weighted(values):
            whole = dataclasses.replace(residual, values=values).decompress()
            return (whole * weights).sum()

        places = np.concatenate(reference.kept_indices(x, 0.875, 16))
        expected = weights.reshape(-1)[places]
        gradient = weighted(residual.values)
        np.testing.assert_array_equal(gradient.reshape(-1), expected)


def _fused_computations(text):
    return re.findall(r"^%?fused_computation\S* .*?^}", text, re.MULTILINE | re.DOTALL)


def _without_names(computation):
    """A computation with numbers for all names, the first time by the order they come.

    So are those of the functions that reductions apply: all of a program do the same.
    """
    names = itertools.count()
    numbers = collections.defaultdict(lambda: f"%{next(names)}")
    plain = re.sub(r", (metadata|frontend_attributes)={.*?}", "", computation)
    header, _, body = plain.partition("\n")
    shapes = re.findall(r"\w+\[[\d,]*\]", header)
    return shapes, re.sub(r"%[\w.-]+", lambda name: numbers[name[0]], body)


class CpuProgramTest(parameterized.TestCase):
    """Compressions in programs of XLA's CPU compiler."""

    def multiplications(self, pack):
        """Returns how often the program computes the operand of the compression."""

        def step(x):
            x = jnp.maximum(x * 3.0 + 1.0, 0.0)
            return x, pack(x.reshape(64, 64, -1))

        x = jax.ShapeDtypeStruct((64, 64 * 16 * _STORAGE.unit), jnp.float32)
        text = jax.jit(step).lower(x).compile().as_text()
        return len(re.findall(r"f32\S* multiply\(", text))

    def test_what_is_compressed_is_computed_once(self):
        pack = functools.partial(dispatch.compress, storage=_STORAGE)
        self.assertEqual(self.multiplications(pack), 1)

    def test_and_would_not_be_if_the_twin_were_inlined(self):
        pack = functools.partial(definitions.compress, storage=_STORAGE)
        self.assertGreater(self.multiplications(pack), 1)

    def test_the_first_and_the_second_element_are_found_by_one_loop(self):
        storage = ChunkStorage(16, 2, "index", "bfloat16")
        compress = functools.partial(dispatch.compress, storage=storage)
        x = jax.ShapeDtypeStruct((8, 24, 16), jnp.float32)
        text = jax.jit(compress).lower(x).compile().as_text()
        loops = [loop for loop in _fused_computations(text) if " reduce(" in loop]
        self.assertLen(loops, 2)
        self.assertEqual(*map(_without_names, loops))

    @parameterized.parameters((2**4, 4, 2), (2**5, 10, 2), (2**14, 24, 4))
    def test_few_loops_are_compiled(self, size, packing, unpacking):
        # Each takes as long to compile, however little is in it.
        policy = DropIT(chunk_size=size, value_dtype="bfloat16")
        compress = functools.partial(dropit_jax.compress, dropit=policy)
        x = jax.ShapeDtypeStruct((8, 6, 4 * size), jnp.float32)
        residual = jax.eval_shape(compress, x)
        programs = (
            jax.jit(compress).lower(x),
            jax.jit(lambda residual, x: residual.decompress(x)).lower(residual, x),
        )
        # From JAX 0.11 on single operations are wrapped as loops, too.
        loop = re.compile(r"%(?!wrapped_)\S+ = .*kind=kLoop")
        loops = [len(loop.findall(p.compile().as_text())) for p in programs]
        self.assertBetween(loops[0], 1, packing)
        self.assertBetween(loops[1], 1, unpacking)


class GpuProgramTest(parameterized.TestCase):
    """Kernels in programs of XLA's GPU compiler, for an activation of 32 MiB."""

    def compiled(self, function, *args):
        """Returns the temporary bytes, the instructions that run, and the text."""
        stats, text = gpu_programs.compiled(function, args)
        entry = text[text.index("\nENTRY") :].splitlines()[1:]
        free = re.compile(r"\b(parameter|constant|tuple|bitcast|get-tuple-element)\(")
        running = [line for line in entry if " = " in line and not free.search(line)]
        return stats["temp_bytes"], running, text

    def round_trips(self, policies):
        """Compressions, and decompressions, of several policies in one program each."""
        x = jax.ShapeDtypeStruct((64, 128, 1024), jnp.float32)

        def pack(x):
            return [dropit_jax.compress(x, policy) for policy in policies]

        def unpack(residuals):
            return [residual.decompress() for residual in residuals]

        packed = jax.eval_shape(pack, x)
        return self.compiled(pack, x), self.compiled(unpack, packed), packed

    def test_kernels_compress_and_decompress_in_one_pass(self):
        policies = [
            DropIT(),
            DropIT(0.5, value_dtype="bfloat16"),
            DropIT(chunk_size=32),
            DropIT(chunk_size=64, encoding="bitmap"),
            DropIT(chunk_size=2**10),
        ]
        for temp_bytes, running, _ in self.round_trips(policies)[:2]:
            self.assertLen(running, len(policies))
            for line in running:
                self.assertIn("__gpu$xla.gpu.triton", line)
            # The addresses of the results, in blocks of 256 bytes.
            self.assertLess(temp_bytes, 512 * len(policies))

    @parameterized.parameters((16, 2), (64, 8))
    def test_without_kernels_small_chunks_take_a_pass_for_each_kept(self, size, k):
        policy = DropIT(1 - k / size, chunk_size=size, selection="xla")
        packing, unpacking, (residual,) = self.round_trips([policy])
        temp_bytes, running, text = packing
        self.assertLessEqual(len(running), k + 3)
        self.assertLessEqual(temp_bytes, 4 * residual.nbytes)
        self.assertNotRegex(text, r" (sort|scatter|gather|while)\(")
        temp_bytes, running, text = unpacking
        self.assertLen(running, 1)
        self.assertLess(temp_bytes, 512)
        self.assertNotRegex(text, r" (sort|scatter|gather|while)\(")

    def test_without_kernels_decompression_fuses_with_what_reads_it(self):
        policy = DropIT(selection="xla")
        x = jax.ShapeDtypeStruct((64, 128, 1024), jnp.float32)
        residual = jax.eval_shape(lambda x: dropit_jax.compress(x, policy), x)
        temp_bytes, running, _ = self.compiled(
            lambda residual, x: jnp.sin(residual.decompress()) * x, residual, x
        )
        # No pass over the activation but one; beside it, the indices are unpacked.
        whole = [line for line in running if "f32[64,128,1024]" in line]
        self.assertLen(whole, 1)
        self.assertLessEqual(len(running), 2)
        self.assertLessEqual(temp_bytes, residual.positions.size * 2 + 512)


if __name__ == "__main__":
    absltest.main()
