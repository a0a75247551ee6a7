"""A small sweep, and what steps might take: as the tests of scaling use them."""

import dataclasses
import functools

from benchmarks.printing import timing
from benchmarks.workloads import image_models, sharded, sweeps
from benchmarks.workloads.models import MLP


def mlp(depth, width=32, batch=4):
    """A training step of a tiny MLP."""
    return dataclasses.replace(
        image_models.mlp(depth, batch),
        model="tiny",
        image_size=8,
        make=functools.partial(MLP, 10, depth=depth, width=width),
    )


SWEEP = sweeps.Sweep("depth", "MLP", "depth", (1, 2, 3), mlp, lambda n: n)


def points(sweep, seconds, added):
    """Points at 1, 2, 3 of each variant, and 10 elements for one of that."""
    return [
        sweeps.Point(
            "point",
            sweep.name,
            value,
            sweep.cost(value),
            variant,
            seconds(value),
            0 if variant == "flax" else 10 * value,
            timing.Spread(added(value), added(value) - 0.1, added(value) + 0.1),
        )
        for value in (1, 2, 3)
        for variant in sweeps.VARIANTS
    ]


def on_devices():
    """Returns made-up results of two variants, on one device and on two."""
    return [
        sharded.OnDevices("devices", 1, "flax", 2, {}, 2**20, 2**22),
        sharded.OnDevices("devices", 1, "dropit_16", 2, {}, 2**19, 2**21),
        sharded.OnDevices("devices", 2, "flax", 2, {"all-reduce": 9}, 2**20, 2**22),
        sharded.OnDevices(
            "devices", 2, "dropit_16", 2, {"all-reduce": 9}, 2**19, 2**21
        ),
    ]
