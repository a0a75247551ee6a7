"""`flax.linen` layers that store their input compressed for the kernel's gradient.

Each is a subclass of Flax's layer of the same name, with the same arguments, parameters
and code. A checkpoint of the Flax layer loads unchanged. If a policy needs a PRNG key,
the layer takes it from the RNG stream `"dropit"`.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from dropit_jax import compat
from dropit_jax.linen import caching
from dropit_jax.policy import DropIT


class Dense(nn.Dense):
    """`flax.linen.Dense` that stores its input compressed.

    Attributes:
      dropit: the policy for the input; `None`: the plain Flax layer. All other
        attributes are as in `flax.linen.Dense`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Returns the layer's output: `(*batch, in) -> (*batch, out)`."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs)


class DenseGeneral(nn.DenseGeneral):
    """`flax.linen.DenseGeneral` that stores its input compressed.

    Attributes:
      dropit: the policy for the input, whose channels are the contracted axes; `None`:
        the plain Flax layer. All other attributes are as in `flax.linen.DenseGeneral`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the layer's output; the axes in `axis` are contracted.

        With `axis=(-2, -1)` and `features=512`: `(8, 16, 4, 32) -> (8, 16, 512)`.
        """
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs)


class Einsum(nn.Einsum):
    """`flax.linen.Einsum` that stores its input compressed.

    Attributes:
      dropit: the policy for the input, whose channels are the axes contracted with the
        kernel; `None`: the plain Flax layer. All other attributes are as in
        `flax.linen.Einsum`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(
        self, inputs: Float[Array, "..."], einsum_str: str | None = None
    ) -> Float[Array, "..."]:
        """Returns the einsum of inputs and kernel; the equation may be an attribute."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs, einsum_str=einsum_str)


class Conv(nn.Conv):
    """`flax.linen.Conv` that stores its input compressed.

    Attributes:
      dropit: the policy for the input; `None`: the plain Flax layer. All other
        attributes are as in `flax.linen.Conv`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch_spatial in"]
    ) -> Float[Array, "*batch_spatial_out out"]:
        """Returns the convolution over the spatial axes, channels last."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs)


class ConvLocal(nn.ConvLocal):
    """`flax.linen.ConvLocal` that stores its input compressed.

    The residual is the input, not the patches of the input.

    Attributes:
      dropit: the policy for the input; `None`: the plain Flax layer. All other
        attributes are as in `flax.linen.ConvLocal`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch_spatial in"]
    ) -> Float[Array, "*batch_spatial_out out"]:
        """Returns the unshared convolution over the spatial axes, channels last."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs)


class ConvTranspose(nn.ConvTranspose):
    """`flax.linen.ConvTranspose` that stores its input compressed.

    Attributes:
      dropit: the policy for the input; `None`: the plain Flax layer. All other
        attributes are as in `flax.linen.ConvTranspose`.
    """

    dropit: DropIT | None = None

    @caching.runs_next_call
    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch_spatial in"]
    ) -> Float[Array, "*batch_spatial_out out"]:
        """Returns the transposed convolution over the spatial axes, channels last."""
        call = compat.without_flax_wrapper(super().__call__)
        return caching.cached(self, call, self.dropit, inputs)


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` that stores inputs compressed.

    The four projections store their inputs compressed. Query, key and value of one
    input have equal residuals, of which XLA stores one under `jax.jit`.

    Attributes:
      dropit: the policy for the inputs of the four projections; `None`: the plain Flax
        layer. All other attributes are as in Flax's layer.
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
        """Returns the output of the attention; the arguments are as in Flax's layer."""
        call = compat.without_flax_wrapper(super().__call__)
        with caching.cached_children(self, self.dropit):
            return call(inputs_q, inputs_k, inputs_v, **kwargs)


class MultiHeadAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` under Flax's other name for it."""


class SelfAttention(nn.SelfAttention):
    """`flax.linen.SelfAttention` that stores the inputs of its projections compressed.

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
        """Returns the output of the attention; the arguments are as in Flax's layer."""
        call = compat.without_flax_wrapper(super().__call__)
        with caching.cached_children(self, self.dropit):
            return call(inputs_q, *args, **kwargs)
