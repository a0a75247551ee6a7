"""`flax.linen` layers that cache their input compressed.

Each is a subclass of Flax's layer of the same name: the same arguments, parameters and
code. A checkpoint of the Flax layer loads unchanged. Policies that need a PRNG key take
it from the RNG stream `"dropit"`.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from dropit_jax import compat
from dropit_jax.linen import caching
from dropit_jax.policy import DropIT


class Dense(nn.Dense):
    """`flax.linen.Dense` that caches its input compressed.

    Attributes:
      dropit: the policy for the input; `None`: the plain Flax layer. All other
        attributes are those of `flax.linen.Dense`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Applies the layer along the last axis."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs)


class DenseGeneral(nn.DenseGeneral):
    """`flax.linen.DenseGeneral` that caches its input compressed.

    Attributes:
      dropit: the policy for the input, whose channels are the contracted axes; `None`:
        the plain Flax layer. All other attributes are those of
        `flax.linen.DenseGeneral`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies the layer along the axes in `axis`."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs)


class Einsum(nn.Einsum):
    """`flax.linen.Einsum` that caches its input compressed.

    Attributes:
      dropit: the policy for the input, whose channels are the axes contracted with the
        kernel; `None`: the plain Flax layer. All other attributes are those of
        `flax.linen.Einsum`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(
        self, inputs: Float[Array, "..."], einsum_str: str | None = None
    ) -> Float[Array, "..."]:
        """Applies the equation, given here or as an attribute."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs, einsum_str=einsum_str)


class Conv(nn.Conv):
    """`flax.linen.Conv` that caches its input compressed.

    Attributes:
      dropit: the policy for the input; `None`: the plain Flax layer. All other
        attributes are those of `flax.linen.Conv`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch_spatial in"]
    ) -> Float[Array, "*batch_spatial_out out"]:
        """Applies the convolution over the spatial axes, channels last."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs)


class ConvLocal(nn.ConvLocal):
    """`flax.linen.ConvLocal` that caches its input compressed.

    The input is cached, not its patches.

    Attributes:
      dropit: the policy for the input; `None`: the plain Flax layer. All other
        attributes are those of `flax.linen.ConvLocal`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch_spatial in"]
    ) -> Float[Array, "*batch_spatial_out out"]:
        """Applies the unshared convolution over the spatial axes, channels last."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs)


class ConvTranspose(nn.ConvTranspose):
    """`flax.linen.ConvTranspose` that caches its input compressed.

    Attributes:
      dropit: the policy for the input; `None`: the plain Flax layer. All other
        attributes are those of `flax.linen.ConvTranspose`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch_spatial in"]
    ) -> Float[Array, "*batch_spatial_out out"]:
        """Applies the transposed convolution over the spatial axes, channels last."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs)


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` whose projections cache compressed.

    Query, key and value of the same input have equal residuals, of which XLA stores one
    under `jax.jit`.

    Attributes:
      dropit: the policy for the inputs of the four projections; `None`: the plain Flax
        layer. All other attributes are those of Flax's layer.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*batch length features"],
        inputs_k: Float[Array, "*batch kv_length features_k"] | None = None,
        inputs_v: Float[Array, "*batch kv_length features_v"] | None = None,
        **kwargs: Any,
    ) -> Float[Array, "*batch length out"]:
        """Applies attention; the arguments are those of Flax's layer."""
        call = compat.without_flax_wrapper(super().__call__)
        with caching.cached_children(self, self.dropit):
            return call(inputs_q, inputs_k, inputs_v, **kwargs)


class MultiHeadAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` by the other name that Flax has for it."""


class SelfAttention(nn.SelfAttention):
    """`flax.linen.SelfAttention` whose projections cache compressed.

    Attributes:
      dropit: as in `MultiHeadDotProductAttention`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*batch length features"],
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, "*batch length out"]:
        """Applies attention; the arguments are those of Flax's layer."""
        call = compat.without_flax_wrapper(super().__call__)
        with caching.cached_children(self, self.dropit):
            return call(inputs_q, *args, **kwargs)
