"""A transformer in plain JAX, with its blocks in `jax.lax.scan` or one by one."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.workloads import steps
from benchmarks.workloads.steps import Step
from benchmarks.workloads.variants import OF_FUNCTIONS, VARIANTS, Variant

_Tokens = Float[Array, "batch length width"]
_Params = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Pre-norm blocks, with the mean square of the last one's output as the loss.

    It has the interface of `benchmarks.workloads.Workload`.

    Attributes:
      layers: the number of blocks.
      width: features of a token.
      heads: heads of the attention.
      tokens: tokens in a sequence.
      batch: sequences in a step.
      dtype: the type of the computation; parameters are float32.
      scan: whether the blocks are one `jax.lax.scan`, with their parameters stacked
        along a first axis.
    """

    layers: int
    width: int
    heads: int
    tokens: int
    batch: int
    dtype: str
    scan: bool

    image_size = None  # there are no images
    paper_mb = None

    @property
    def model(self) -> str:
        """The name in tables."""
        kind = "in lax.scan" if self.scan else "one by one"
        return f"Transformer of {self.layers} blocks {kind}"

    @property
    def name(self) -> str:
        """The name on a command line."""
        return f"{self.model}, {self.dtype}"

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants by name; the first is the baseline."""
        return {name: VARIANTS[name] for name in OF_FUNCTIONS}

    @property
    def attention_core_flops(self) -> float:
        """The FLOPs of computing the attention scores of all layers once."""
        return 2.0 * self.layers * self.batch * self.tokens**2 * self.width

    def title(self, where: str) -> str:
        """Returns the title of a table.

        Args:
          where: the device, or the target.
        """
        return (
            f"### {self.model}, width {self.width:,}, {self.heads} heads, "
            f"{self.batch} x {self.tokens:,} tokens, {self.dtype}, {where}"
        )

    def training_step(
        self, variant: Variant, batch: int | None = None
    ) -> tuple[Step, tuple[Any, ...], tuple[int, ...]]:
        """Returns a step of SGD with momentum.

        Args:
          variant: the way to save memory.
          batch: sequences in the step; `None` for the workload's own.

        Returns:
          The step, its arguments as `jax.ShapeDtypeStruct`s, and the numbers of those
          to donate.
        """
        params, others, x = self.arguments(batch)
        variables = {"params": params} | others
        opt_state = jax.eval_shape(steps.OPTIMIZER.init, params)
        step = steps.training_step(self.loss(variant))
        return step, (variables, opt_state, x), steps.DONATED

    def loss(self, variant: Variant) -> Callable[..., tuple[Array, Any]]:
        """Returns the loss, a function of parameters, an empty dict, and tokens."""
        block: Callable[[_Params, _Tokens], _Tokens] = _block
        if variant.remat == "blocks":
            block = jax.checkpoint(_block)

        def loss(
            params: Any, others: dict[str, Any], x: _Tokens
        ) -> tuple[Float[Array, ""], Any]:
            if self.scan:
                y, _ = jax.lax.scan(lambda x, own: (block(own, x), None), x, params)
            else:
                y = functools.reduce(lambda x, own: block(own, x), params, x)
            return jnp.mean(y.astype(jnp.float32) ** 2), others

        return variant.applied(loss)

    def arguments(self, batch: int | None = None) -> tuple[Any, dict[str, Any], Any]:
        """Returns the arguments of the loss, as `jax.ShapeDtypeStruct`s."""
        shapes = _shapes(self.width, self.heads)
        leading = (self.layers,) if self.scan else ()
        block = {
            name: jax.ShapeDtypeStruct((*leading, *shape), jnp.float32)
            for name, shape in shapes.items()
        }
        x = (batch or self.batch, self.tokens, self.width)
        params = block if self.scan else [block] * self.layers
        return params, {}, jax.ShapeDtypeStruct(x, jnp.dtype(self.dtype))


def _shapes(width: int, heads: int) -> dict[str, tuple[int, ...]]:
    projected = (width, heads, width // heads)
    return {
        "scale1": (width,),
        "offset1": (width,),
        "query": projected,
        "key": projected,
        "value": projected,
        "out": (heads, width // heads, width),
        "scale2": (width,),
        "offset2": (width,),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }


def _block(params: _Params, x: _Tokens) -> _Tokens:
    """Applies attention and an MLP, each with a norm before it and a shortcut."""
    kernel = functools.partial(_kernel, params, x.dtype)
    y = _norm(x, params["scale1"], params["offset1"])
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", y, kernel(name))
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("bthk,hkd->btd", mixed, kernel("out"))
    y = _norm(x, params["scale2"], params["offset2"])
    return x + jax.nn.gelu(y @ kernel("up")) @ kernel("down")


def _kernel(params: _Params, dtype: Any, name: str) -> Array:
    return params[name].astype(dtype)


def _norm(x: _Tokens, scale: Array, offset: Array) -> _Tokens:
    """Applies a layer norm, computed in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    deviation = jax.lax.rsqrt(wide.var(-1, keepdims=True) + 1e-6)
    return (centred * deviation * scale + offset).astype(x.dtype)


SCANNED = Transformer(12, 1024, 16, 1024, 16, "bfloat16", scan=True)
UNROLLED = Transformer(24, 1024, 16, 1024, 16, "bfloat16", scan=False)
