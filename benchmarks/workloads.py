"""The training steps that are measured, and the ways to save memory in them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from benchmarks.models import MLP
from dropit_jax import LayerPreset, layer_preset
from train.models.resnet import ResNet
from train.models.vit import ViT

Step = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and what it is trained on.

    Attributes:
      model: its name.
      image_size: side of the images, in pixels.
      batch: images in a step.
      dtype: of the computation; parameters are float32.
      make: the model with a preset.
      attention: layers, tokens and width of the attention; `None`: there is none.
      paper_mb: memory of the baseline and of DropIT in the paper (Table 3), in MB.
      channels: of the images.
    """

    model: str
    image_size: int
    batch: int
    dtype: str
    make: Callable[[LayerPreset], nn.Module]
    attention: tuple[int, int, int] | None
    paper_mb: tuple[int, int] | None
    channels: int = 3

    @property
    def attention_core_flops(self) -> float:
        """What it takes to compute the scores of all layers once.

        A preset that recomputes the scores adds as much to a step.
        """
        if self.attention is None:
            return 0.0
        layers, tokens, width = self.attention
        return 2.0 * layers * self.batch * tokens**2 * width


def _vit(dtype: str) -> Callable[[LayerPreset], nn.Module]:
    def make(memory: LayerPreset) -> nn.Module:
        compute = None if dtype == "float32" else jnp.dtype(dtype)
        return ViT(num_classes=100, dtype=compute, memory=memory)

    return make


_TOKENS = (224 // 16) ** 2 + 1

WORKLOADS = (
    Workload(
        "ResNet-18",
        image_size=32,
        batch=128,
        dtype="float32",
        make=lambda memory: ResNet(100, stem="cifar", memory=memory),
        attention=None,
        paper_mb=(648, 598),
    ),
    Workload(
        "ResNet-18",
        image_size=224,
        batch=256,
        dtype="float32",
        make=lambda memory: ResNet(1000, stem="imagenet", memory=memory),
        attention=None,
        paper_mb=(2826, 2600),
    ),
    Workload(
        "ViT-B/16",
        image_size=224,
        batch=128,
        dtype="float32",
        make=_vit("float32"),
        attention=(12, _TOKENS, 768),
        paper_mb=(20290, 16052),
    ),
    Workload(
        "ViT-B/16",
        image_size=224,
        batch=128,
        dtype="bfloat16",
        make=_vit("bfloat16"),
        attention=(12, _TOKENS, 768),
        paper_mb=None,
    ),
)

# The first is what all others are measured against.
VARIANTS: dict[str, LayerPreset] = {
    "baseline": layer_preset("baseline"),
    # The kept values in the activations' own type, as in the paper.
    "dropit_float32": layer_preset("dropit", value_dtype=None),
    "dropit": layer_preset("dropit"),
    "lean": layer_preset("lean"),
    "lean+remat_blocks": layer_preset("lean", remat="blocks"),
    "remat_dots": layer_preset("baseline", remat="dots"),
    "remat_blocks": layer_preset("baseline", remat="blocks"),
}

# The variants whose steps are timed; the first is what all others are measured against.
TIMED_VARIANTS: dict[str, LayerPreset] = {
    "flax": layer_preset("baseline"),
    "dropit_16": layer_preset("dropit"),
    "dropit_32": layer_preset("dropit", chunk_size=32),
    "dropit_16384": layer_preset("dropit", chunk_size=2**14),
    "lean": layer_preset("lean"),
    "remat_blocks": layer_preset("baseline", remat="blocks"),
    "remat_dots": layer_preset("baseline", remat="dots"),
}


def mlp(layers: int = 4, batch: int = 256) -> Workload:
    """Hidden layers of 1024 features on grey images of 28² pixels."""
    return Workload(
        "MLP",
        image_size=28,
        batch=batch,
        dtype="float32",
        make=lambda memory: MLP(10, layers=layers, memory=memory),
        attention=None,
        paper_mb=None,
        channels=1,
    )


def resnet18(width: int, batch: int = 32) -> Workload:
    """ResNet-18 of a width on images of 32² pixels, in float32."""
    return Workload(
        f"ResNet-18 (width {width})",
        image_size=32,
        batch=batch,
        dtype="float32",
        make=lambda memory: ResNet(10, width=width, stem="cifar", memory=memory),
        attention=None,
        paper_mb=None,
    )


def vit_s16(batch: int = 4) -> Workload:
    """ViT-S/16 (Touvron et al., 2021, Table 1) on images of 224² pixels, in float32."""
    return Workload(
        "ViT-S/16",
        image_size=224,
        batch=batch,
        dtype="float32",
        make=lambda memory: ViT(num_classes=10, width=384, num_heads=6, memory=memory),
        attention=(12, _TOKENS, 384),
        paper_mb=None,
    )


def title(described: Any, where: str) -> str:
    """Above a table: what was trained, and where.

    Args:
      described: a workload, or a result of one, which has its fields.
      where: a device, or the GPU that was compiled for.
    """
    return (
        f"### {described.model}, {described.image_size}², batch {described.batch}, "
        f"{described.dtype}, {where}"
    )


def variants(workload: Workload) -> dict[str, LayerPreset]:
    """The variants that differ for a workload."""
    without = set()
    if workload.attention is None:
        without.add("remat_dots")  # of a convolution that policy keeps nothing
    if workload.dtype != "float32":
        without.add("dropit_float32")
    return {name: memory for name, memory in VARIANTS.items() if name not in without}


def training_step(
    workload: Workload, memory: LayerPreset, batch: int | None = None
) -> tuple[Step, tuple[Any, ...], tuple[int, ...]]:
    """A step of SGD with momentum on the cross-entropy.

    Args:
      workload: what is trained.
      memory: what it caches.
      batch: images in the step; `None`: the workload's.

    Returns:
      The step, its arguments as `jax.ShapeDtypeStruct`s, and which are to be donated.
    """
    model, optimizer = workload.make(memory), optax.sgd(0.1, momentum=0.9)
    size, batch = workload.image_size, batch or workload.batch

    def step(
        variables: Any, opt_state: optax.OptState, images: Array, labels: Array
    ) -> tuple[Any, optax.OptState]:
        def loss_fn(params: Any) -> tuple[Array, Any]:
            logits, updates = model.apply(
                variables | {"params": params}, images, True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        gradients, updates = jax.grad(loss_fn, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, opt_state

    images = jax.ShapeDtypeStruct((batch, size, size, workload.channels), jnp.float32)
    variables = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x[:1], False), images
    )
    opt_state = jax.eval_shape(optimizer.init, variables["params"])
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return step, (variables, opt_state, images, labels), (0, 1)


def real_arguments(workload: Workload) -> tuple[Any, ...]:
    """Arguments of a workload's step, the same for every preset.

    Returns:
      Variables and an optimizer's state as before the first step, random images, and
      random labels.
    """
    memory = layer_preset("baseline")
    _, (_, opt_state, images, labels), _ = training_step(workload, memory)
    keys = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(keys[0], images.shape, images.dtype)
    init = jax.jit(lambda key, x: workload.make(memory).init_with_output(key, x, False))
    logits, variables = init(keys[1], images[:1])
    classes = logits.shape[-1]
    labels = jax.random.randint(keys[2], labels.shape, 0, classes, labels.dtype)
    # SGD starts from a momentum of zero.
    opt_state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), opt_state)
    return variables, opt_state, images, labels
