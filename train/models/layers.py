"""The layers and functions that models are built of: Flax's, or DropIT's."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax

import dropit_jax
from dropit_jax import DropIT

Remat = Literal["none", "blocks", "dots"]
REMATS: tuple[Remat, ...] = get_args(Remat)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layers and functions with the arguments of those in `flax.linen`.

    Attributes:
      dense: dense layers.
      conv: convolutions.
      attention: multi-head attention.
      head: the dense layer that gives the logits.
      relu: the rectifier.
    """

    dense: Callable[..., nn.Module] = nn.Dense
    conv: Callable[..., nn.Module] = nn.Conv
    attention: Callable[..., nn.Module] = nn.MultiHeadDotProductAttention
    head: Callable[..., nn.Module] = nn.Dense
    relu: Callable[..., Any] = nn.relu


FLAX = Layers()


@functools.cache  # Flax compares the fields of modules, and functions by identity
def dropit(policy: DropIT) -> Layers:
    """Returns the layers of `dropit_jax.linen` with a policy, and a one-bit ReLU.

    The head reads one vector a sample, which has no positions to fill with a mean: its
    dropped elements are zero whatever `policy.fill` is.
    """

    def layer(kind: Callable[..., nn.Module], policy: DropIT = policy) -> Any:
        return functools.partial(kind, dropit=policy)

    linen = dropit_jax.linen
    return Layers(
        dense=layer(linen.Dense),
        conv=layer(linen.Conv),
        attention=layer(linen.MultiHeadDotProductAttention),
        head=layer(linen.Dense, dataclasses.replace(policy, fill="zero")),
        relu=dropit_jax.nn.relu,
    )


def remat(kind: Any, how: Remat) -> Any:
    """Returns a block, recomputed in the backward pass as a config says.

    Args:
      kind: a class of modules whose call takes `(self, x, train, ...)`, or a function
        of a module.
      how: "none": the block itself; "blocks": all of it is recomputed; "dots": all but
        the outputs of products with parameters.
    """
    if how == "none":
        return kind
    policy = None
    if how == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(kind, static_argnums=(2,), policy=policy)
