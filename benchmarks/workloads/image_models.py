"""The models of images that the benchmarks train, and their training steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from benchmarks.workloads import steps
from benchmarks.workloads.models import MLP
from benchmarks.workloads.steps import Step
from benchmarks.workloads.variants import VARIANTS, Variant
from train.models.resnet import ResNet
from train.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model with the size of its batches and images.

    Attributes:
      model: the name of the model.
      image_size: the side of the images, in pixels.
      batch: the number of images in a step.
      dtype: the dtype of the computation; parameters are float32.
      make: makes the model, with the fields `layers` and `remat`.
      attention: the numbers of layers and tokens and the width of the attention;
        `None`: the model has no attention.
      paper_mb: the memory of the baseline and of DropIT in the paper (Table 3), in MB;
        `None`: not in the paper.
      channels: the channels of the images.
    """

    model: str
    image_size: int
    batch: int
    dtype: str
    make: Callable[..., nn.Module]
    attention: tuple[int, int, int] | None
    paper_mb: tuple[int, int] | None
    channels: int = 3

    @property
    def name(self) -> str:
        """The name of the workload on a command line."""
        return f"{self.model}, {self.image_size}², {self.dtype}"

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants that differ for this workload, the baseline first."""
        without = set()
        if self.attention is None:
            without.add("remat_dots")  # recomputes convolutions, as remat_blocks does
        if self.dtype != "float32":
            without.add("dropit_layers_float32")
        return {name: each for name, each in VARIANTS.items() if name not in without}

    @property
    def attention_core_flops(self) -> float:
        """The FLOPs of the attention's scores of all layers, computed once.

        A preset that recomputes the scores adds as many to a step.
        """
        if self.attention is None:
            return 0.0
        layers, tokens, width = self.attention
        return 2.0 * layers * self.batch * tokens**2 * width

    def title(self, where: str) -> str:
        """Returns the title of a table of this workload, as the function `title`."""
        return title(self, where)

    def training_step(
        self, variant: Variant, batch: int | None = None
    ) -> tuple[Step, tuple[Any, ...], tuple[int, ...]]:
        """Returns a step of SGD with momentum on the cross-entropy, to compile.

        Args:
          variant: the variant of the step.
          batch: the number of images in the step; `None`: that of the workload.

        Returns:
          The step, its arguments as `jax.ShapeDtypeStruct`s, and the positions of the
          arguments to donate.
        """
        size = self.image_size
        images = jax.ShapeDtypeStruct(
            (batch or self.batch, size, size, self.channels), jnp.float32
        )
        variables = _variables(self, variant)
        opt_state = jax.eval_shape(steps.OPTIMIZER.init, variables["params"])
        labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32)
        step = steps.training_step(self.loss(variant))
        return step, (variables, opt_state, images, labels), steps.DONATED

    def loss(self, variant: Variant) -> Callable[..., tuple[Array, Any]]:
        """Returns the function of the mean cross-entropy of a batch.

        The function takes parameters, other variables, images and labels. It returns
        the cross-entropy and the new other variables.
        """
        model = variant.model(self.make)

        def loss(
            params: Any, others: dict[str, Any], images: Array, labels: Array
        ) -> tuple[Array, Any]:
            logits, updates = model.apply(
                others | {"params": params}, images, True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        return variant.applied(loss)


@functools.cache
def _variables(workload: Workload, variant: Variant) -> Any:
    """Returns the variables of a model, as `jax.ShapeDtypeStruct`s."""
    model, size = variant.model(workload.make), workload.image_size
    image = jax.ShapeDtypeStruct((1, size, size, workload.channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), image)


_TOKENS = (224 // 16) ** 2 + 1

WORKLOADS = (
    Workload(
        "ResNet-18",
        image_size=32,
        batch=128,
        dtype="float32",
        make=functools.partial(ResNet, 100, stem="cifar"),
        attention=None,
        paper_mb=(648, 598),
    ),
    Workload(
        "ResNet-18",
        image_size=224,
        batch=256,
        dtype="float32",
        make=functools.partial(ResNet, 1000, stem="imagenet"),
        attention=None,
        paper_mb=(2826, 2600),
    ),
    Workload(
        "ViT-B/16",
        image_size=224,
        batch=128,
        dtype="float32",
        make=functools.partial(ViT, 100),
        attention=(12, _TOKENS, 768),
        paper_mb=(20290, 16052),
    ),
    Workload(
        "ViT-B/16",
        image_size=224,
        batch=128,
        dtype="bfloat16",
        make=functools.partial(ViT, 100, dtype=jnp.dtype("bfloat16")),
        attention=(12, _TOKENS, 768),
        paper_mb=None,
    ),
)


def mlp(depth: int = 4, batch: int = 256) -> Workload:
    """Returns an MLP of 1024 features on grey images of 28² pixels, in float32."""
    return Workload(
        "MLP",
        image_size=28,
        batch=batch,
        dtype="float32",
        make=functools.partial(MLP, 10, depth=depth),
        attention=None,
        paper_mb=None,
        channels=1,
    )


def resnet18(width: int, batch: int = 32) -> Workload:
    """Returns ResNet-18 of a width on images of 32² pixels, in float32."""
    return Workload(
        f"ResNet-18 (width {width})",
        image_size=32,
        batch=batch,
        dtype="float32",
        make=functools.partial(ResNet, 10, width=width, stem="cifar"),
        attention=None,
        paper_mb=None,
    )


def vit_s16(batch: int = 4) -> Workload:
    """Returns ViT-S/16 (Touvron et al., 2021, Table 1) on images of 224² pixels."""
    return Workload(
        "ViT-S/16",
        image_size=224,
        batch=batch,
        dtype="float32",
        make=functools.partial(ViT, num_classes=10, width=384, num_heads=6),
        attention=(12, _TOKENS, 384),
        paper_mb=None,
    )


def title(described: Any, where: str) -> str:
    """Returns the title of a table: the model, its images and batch, and the device.

    Args:
      described: a workload, or a result, which has the same fields.
      where: the name of the device, or of the GPU that was compiled for.
    """
    return (
        f"### {described.model}, {described.image_size}², batch {described.batch}, "
        f"{described.dtype}, {where}"
    )


def real_arguments(workload: Workload) -> tuple[Any, ...]:
    """Returns the arguments of a workload's first step, for any variant.

    Returns:
      The initial variables, the initial optimizer's state, random images of shape
      `(batch, size, size, channels)`, and random labels of shape `(batch,)`.
    """
    plain = VARIANTS["baseline"]
    _, (_, opt_state, images, labels), _ = workload.training_step(plain)
    keys = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(keys[0], images.shape, images.dtype)
    model = plain.model(workload.make)
    init = jax.jit(lambda key, x: model.init_with_output(key, x, False))
    logits, variables = init(keys[1], images[:1])
    classes = logits.shape[-1]
    labels = jax.random.randint(keys[2], labels.shape, 0, classes, labels.dtype)
    # SGD starts from a momentum of zero.
    opt_state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), opt_state)
    return variables, opt_state, images, labels
