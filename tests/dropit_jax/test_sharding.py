"""On meshes of eight devices: the collectives of Flax, and the gradients of one device.

In float64, where activations that are summed in another order on a mesh are the same to
so many digits that the same elements are kept of them.
"""

import collections
import itertools

import chex
import jax
from absl.testing import absltest, parameterized
from jax.sharding import AxisType

from dropit_jax import DropIT
from tests.dropit_jax.sharded_models import (
    MESHES,
    SHARDED_ACTIVATIONS,
    on_mesh,
    on_one_device,
)

_SMALL = DropIT(0.75)
_LARGE = DropIT(0.8, chunk_size=2**14)
# (mesh, number of features): 128 are whole chunks on each device and 72 are not; where
# features are not sharded, the first says no more than the second.
_SIZES = (
    ("data", 72),
    ("fsdp", 72),
    ("tensor", 128),
    ("tensor", 72),
    ("data_tensor", 128),
    ("data_tensor", 72),
)
_AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
# Models of layers that are tested alone on every mesh, and layers as they are in shapes
# of another rank; these two meshes have all that the others have.
_LIKE_OTHERS = {
    "vectors": (("fsdp", 72), ("data_tensor", 128), ("data_tensor", 72)),
    "dense_general": (("data_tensor", 128), ("data_tensor", 72), ("fsdp", 72)),
    "resnet": (("data_tensor", 72), ("fsdp", 72)),
    "vit": (("data_tensor", 72), ("data_tensor", 72)),
}


def _models_on_meshes():
    """Model, policy, mesh, features and type of axes.

    A dense layer is in all ways, and the others with one policy and one type of axes
    in each.
    """
    for axis_type in _AXIS_TYPES:
        yield from (("dense", _SMALL, *size, axis_type) for size in _SIZES)
    of_72 = [size for size in _SIZES if size[1] == 72]
    yield from _alternating(*(("dense", _LARGE, *size) for size in of_72), start=1)
    for start, model in enumerate(("conv", *_LIKE_OTHERS)):
        sizes = _LIKE_OTHERS.get(model, _SIZES)
        policies = _policies(model, sizes, start)
        cases = zip(policies, sizes, strict=True)
        yield from _alternating(
            *((model, policy, *size) for policy, size in cases), start=start
        )


def _policies(model, sizes, start):
    """The two in turn, but one for whole chunks and one for models of many layers."""
    both = itertools.cycle((_SMALL, _LARGE) if start % 2 else (_LARGE, _SMALL))
    for _, features in sizes:
        if features == 128:
            yield _SMALL
        else:
            yield _LARGE if model in ("resnet", "vit") else next(both)


def _alternating(*cases, start=0):
    """Every case with one type of axes: as often with either."""
    return tuple((*case, _AXIS_TYPES[(start + i) % 2]) for i, case in enumerate(cases))


class ShardingTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(jax.enable_x64(True))

    def _assert_gradients_are_those_of_one_device(self, gradients, *case):
        expected = on_one_device(*case)
        chex.assert_trees_all_close(gradients, expected, rtol=1e-9, atol=1e-9)

    @parameterized.parameters(*_models_on_meshes())
    def test_min_k_elements(self, model, policy, mesh, features, axis_type):
        flax, _ = on_mesh(model, features, None, mesh, axis_type)
        shards = MESHES[mesh][0].get("model", 1)
        case = model, features, policy
        collectives, gradients = on_mesh(*case, mesh, axis_type)
        self._assert_gradients_are_those_of_one_device(gradients, *case)
        added = collections.Counter()
        if shards > 1 and features // shards % policy.chunk_size:
            # A chunk whose elements are on several devices: they have to meet.
            added["all-gather"] = SHARDED_ACTIVATIONS[model]
        self.assertEqual(collectives - flax, added)
        self.assertEqual(flax - collectives, collections.Counter())

    @parameterized.parameters(
        case
        for start, (policy, *more) in enumerate(
            (
                (DropIT(0.0),),
                (DropIT(0.5, value_dtype="int4", group_size=8), "fsdp"),
                (DropIT(0.75, value_dtype="bfloat16", encoding="bitmap"),),
                (DropIT(0.75, fill="mean"), "data"),
            )
        )
        for case in _alternating(
            *((policy, mesh) for mesh in ("tensor", "data_tensor", *more)), start=start
        )
    )
    def test_values_and_fill_move_nothing(self, policy, mesh, axis_type):
        # 16 features on a device, and of these 8 in a group.
        case = "dense", 128, policy
        flax, _ = on_mesh("dense", 128, None, mesh, axis_type)
        collectives, gradients = on_mesh(*case, mesh, axis_type)
        self._assert_gradients_are_those_of_one_device(gradients, *case)
        self.assertEqual(collectives, flax)

    @parameterized.parameters(*_alternating(("data",), ("fsdp",)))
    def test_channels_add_the_sum_of_their_norms(self, mesh, axis_type):
        case = "dense", 72, DropIT(0.75, granularity="channel")
        flax, _ = on_mesh("dense", 72, None, mesh, axis_type)
        collectives, gradients = on_mesh(*case, mesh, axis_type)
        self._assert_gradients_are_those_of_one_device(gradients, *case)
        self.assertEqual(collectives, flax + collections.Counter({"all-reduce": 2}))

    @parameterized.parameters(
        *_alternating(*((DropIT(0.75, chunk_size=None), mesh) for mesh in MESHES)),
        *_alternating(
            *(
                (DropIT(0.75, granularity="channel"), mesh)
                for mesh in ("tensor", "data_tensor")
            )
        ),
    )
    def test_choices_over_the_whole_batch_are_those_of_one_device(
        self, policy, mesh, axis_type
    ):
        case = "dense", 72, policy
        _, gradients = on_mesh(*case, mesh, axis_type)
        self._assert_gradients_are_those_of_one_device(gradients, *case)


if __name__ == "__main__":
    absltest.main()
