"""Max pooling whose residual is the place of each window's largest element.

JAX's own rule stores the whole input.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped, UInt

from dropit_jax.storage import element_codes
from dropit_jax.storage.element_codes import ElementCodes
from dropit_jax.storage.shapes import Shape
from dropit_jax.xla import barriers


def largest_of_windows(
    x: Shaped[Array, "*shape"],
    shape: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Shaped[Array, "*out"]:
    """Returns the largest element of each window, `(*shape) -> (*out)`.

    Windows (1, 2, 2, 1) with equal strides: `(8, 32, 32, 64) -> (8, 16, 16, 64)`. The
    residual takes 4 bits for each element of the result if a window has up to 16
    elements, 8 bits up to 256, and 16 bits beyond.

    The value is bit-identical to that of `lax.reduce_window`. So is the gradient, on a
    CPU and for windows of more than one element. Of equal elements, padding included,
    the first gets the cotangent. In a window with NaN, the largest element after the
    last NaN gets the cotangent; if no element follows, the NaN does. If windows
    overlap, their cotangents are added to an element in row-major order.

    Args:
      x: an array of a real floating-point dtype.
      shape: the size of a window along each axis.
      strides: the step from window to window along each axis.
      padding: the numbers of padding elements before and after, along each axis.
    """
    return _pool(_Windows(x.shape, tuple(shape), tuple(strides), tuple(padding)), x)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Windows on an array; all fields have a number for each axis of the array.

    Attributes:
      inputs: the shape of the array.
      shape: the shape of a window.
      strides: the steps from window to window.
      padding: the numbers of padding elements before and after.
    """

    inputs: Shape
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def widths(self) -> list[Any]:
        """The lengths of a slice from the first window's start to the last one's.

        With strides, the slice has one element per window: 3 windows with a stride of 2
        give a length of 5. The length is 0 without windows.
        """
        padded = (
            n + sum(pad) for n, pad in zip(self.inputs, self.padding, strict=True)
        )
        room = [n - size for n, size in zip(padded, self.shape, strict=True)]
        return [
            max(0, n - n % stride + 1)
            for n, stride in zip(room, self.strides, strict=True)
        ]

    @property
    def bits(self) -> int:
        """The bits of a stored place in a window: 4, 8 or 16; 4 for a window of 3x3."""
        size = math.prod(self.shape)
        return 4 if size <= 2**4 else 8 if size <= 2**8 else 16

    def largest(self, x: Array) -> Array:
        """Returns the largest element of each window."""
        lowest = -jnp.inf
        return lax.reduce_window(
            x, lowest, lax.max, self.shape, self.strides, self.padding
        )

    def slices(self, x: Array) -> Iterator[Array]:
        """Yields, for each place in a window, the elements there: one per window.

        `(*inputs) -> (*out)` for each place, in row-major order. Padding is -inf.
        """
        pads = [(*pad, 0) for pad in self.padding]
        padded = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), pads)
        for place in itertools.product(*map(range, self.shape)):
            # Without windows there is no first element.
            start = [i if n else 0 for i, n in zip(place, self.widths, strict=True)]
            stop = [i + n for i, n in zip(start, self.widths, strict=True)]
            yield lax.slice(padded, start, stop, self.strides)

    def shares(self, index: Array, cotangent: Array) -> Iterator[Array]:
        """Yields parts of the gradient, one for each of the windows over an element.

        A part has a window's cotangent at the largest element of the window, and zero
        elsewhere. With windows of 3 and a stride of 2 an element is in up to two
        windows, so there are two parts. The first part is of the first windows.

        With the stride s, the element s m + r, with r < s and counted from the start of
        the padding, is at place r + s a of window m - a, for a = 0, 1, ... So a
        window's place and cotangent are read once for each a, and not once for each
        place. A part has an axis for m and, if the stride is not 1, a next axis for r.
        """
        # Without other parts -0 would remain, since XLA removes a sum with 0.
        cotangent = jnp.where(cotangent == 0, 0, cotangent)
        # Padded in memory: otherwise a GPU checks each element for padding.
        index, cotangent = barriers.barrier(
            (self._surrounded(index), self._surrounded(cotangent))
        )
        for back in itertools.product(*(reversed(range(n)) for n in self._overlaps)):
            place = self._places(back)
            has_it = self._over_elements(index, back).astype(place.dtype) == place
            given = self._over_elements(cotangent, back)
            yield jnp.where(has_it, given, jnp.zeros((), given.dtype))

    @property
    def _overlaps(self) -> list[int]:
        """The largest number of windows over an element, along each axis."""
        sizes = zip(self.shape, self.strides, strict=True)
        return [-(-size // stride) for size, stride in sizes]

    def _places(self, back: tuple[int, ...]) -> np.ndarray:
        """Returns the place in window m - `back` of the element r, for each r.

        The result broadcasts to a part of the gradient; `shares` defines m and r. The
        place of an element outside the window is the number of elements in a window.
        """
        place, exists = np.asarray(0), np.asarray(True)
        for size, stride, windows in zip(self.shape, self.strides, back, strict=True):
            along = np.arange(stride) + stride * windows
            axes = (..., None) if stride == 1 else (..., None, None)
            place, exists = place[axes] * size + along, exists[axes] & (along < size)
        count = math.prod(self.shape)
        return np.where(exists, place, count).astype(np.min_scalar_type(count))

    def _surrounded(self, of_windows: Array) -> Array:
        """Pads an array of one number per window, for `_over_elements` to slice.

        `n -> overlap - 1 + steps` along each axis: zeros before the first window and
        after the last. Windows that start after the array's end are cut off.
        """
        pads = [
            (overlap - 1, steps - count, 0)
            for overlap, steps, count in zip(
                self._overlaps, self._steps, of_windows.shape, strict=True
            )
        ]
        return lax.pad(of_windows, jnp.zeros((), of_windows.dtype), pads)

    def _over_elements(self, surrounded: Array, back: tuple[int, ...]) -> Array:
        """Returns the number of window m - `back` for each m; broadcasts to a part."""
        start = [n - 1 - i for n, i in zip(self._overlaps, back, strict=True)]
        stop = [i + n for i, n in zip(start, self._steps, strict=True)]
        shifted = lax.slice(surrounded, start, stop)
        strided = [axis for axis, stride in enumerate(self.strides) if stride > 1]
        return jnp.expand_dims(
            shifted, [i + axis + 1 for i, axis in enumerate(strided)]
        )

    def elements(self, share: Array) -> Array:
        """Returns a part of the gradient, or a sum of parts, in the array's shape."""
        pads = []
        for axis, stride in enumerate(self.strides):
            if stride > 1:  # axis by axis, which keeps other axes' explicit shardings
                share = lax.collapse(share, axis, axis + 2)
            before, _ = self.padding[axis]
            after = before + self.inputs[axis] - share.shape[axis]
            pads.append((-before, after, 0))
        return lax.pad(share, jnp.zeros((), share.dtype), pads)

    @property
    def _steps(self) -> list[Any]:
        """The number of strides from the start of the padding to the array's end."""
        return [
            max(0, -(-(n + before) // stride))
            for n, (before, _), stride in zip(
                self.inputs, self.padding, self.strides, strict=True
            )
        ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(windows: _Windows, x: Array) -> Array:
    return windows.largest(x)


def _pool_forward(windows: _Windows, x: Array) -> tuple[Array, ElementCodes]:
    index = _first_largest(windows, lax.stop_gradient(x))
    return element_codes.store_apart(
        windows.largest(x), index, windows.bits, "max_pool"
    )


def _first_largest(windows: _Windows, x: Array) -> UInt[Array, "..."]:
    """Returns the place of each window's largest element, as SelectAndScatter does."""
    dtype = jnp.uint16 if windows.bits == 16 else jnp.uint8
    slices = windows.slices(x)
    largest = next(slices)
    index = jnp.zeros_like(largest, dtype)
    for place, candidate in enumerate(slices, start=1):
        # False where either is NaN.
        stays = largest >= candidate
        largest = jnp.where(stays, largest, candidate)
        index = jnp.where(stays, index, jnp.asarray(place, dtype))
    return index


def _pool_backward(
    windows: _Windows, saved: ElementCodes, cotangent: Array
) -> tuple[Array]:
    index = element_codes.load(saved, cotangent)
    shares = windows.shares(index, cotangent)
    return (windows.elements(functools.reduce(operator.add, shares)),)


_pool.defvjp(_pool_forward, _pool_backward)
