"""Vision transformers in plain NumPy, straight from the arrays of published files.

It shares no code with the program. Names, shapes and layouts are those of Google's .npz
files (github.com/google-research/vision_transformer, vit_jax/models_vit.py) and of
Hugging Face's .safetensors (transformers, models/vit/modeling_vit.py). All is computed
in float64.
"""

import math

import numpy as np


def google_shapes(classes, patch, width, layers, heads, positions, pre_logits=False):
    """Names and shapes of Google's file; `positions` counts the class token's."""
    head, hidden = width // heads, 4 * width
    shapes = {
        "cls": (1, 1, width),
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, positions, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, classes),
        "head/bias": (classes,),
    }
    if pre_logits:
        shapes |= {"pre_logits/kernel": (width, width), "pre_logits/bias": (width,)}
    for layer in range(layers):
        block = f"Transformer/encoderblock_{layer}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            shapes[f"{attention}/{name}/kernel"] = (width, heads, head)
            shapes[f"{attention}/{name}/bias"] = (heads, head)
        shapes[f"{attention}/out/kernel"] = (heads, head, width)
        shapes[f"{attention}/out/bias"] = (width,)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes[f"{block}/{norm}/scale"] = (width,)
            shapes[f"{block}/{norm}/bias"] = (width,)
        shapes[f"{block}/MlpBlock_3/Dense_0/kernel"] = (width, hidden)
        shapes[f"{block}/MlpBlock_3/Dense_0/bias"] = (hidden,)
        shapes[f"{block}/MlpBlock_3/Dense_1/kernel"] = (hidden, width)
        shapes[f"{block}/MlpBlock_3/Dense_1/bias"] = (width,)
    return shapes


def hugging_face_shapes(classes, patch, width, layers, positions):
    """Names and shapes of `ViTForImageClassification`'s file."""
    hidden = 4 * width
    shapes = {
        "vit.embeddings.cls_token": (1, 1, width),
        "vit.embeddings.position_embeddings": (1, positions, width),
        "vit.embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": (width,),
        "vit.layernorm.weight": (width,),
        "vit.layernorm.bias": (width,),
        "classifier.weight": (classes, width),
        "classifier.bias": (classes,),
    }
    for layer in range(layers):
        block = f"vit.encoder.layer.{layer}"
        for name, features_out, features_in in (
            ("attention.attention.query", width, width),
            ("attention.attention.key", width, width),
            ("attention.attention.value", width, width),
            ("attention.output.dense", width, width),
            ("intermediate.dense", hidden, width),
            ("output.dense", width, hidden),
        ):
            shapes[f"{block}.{name}.weight"] = (features_out, features_in)
            shapes[f"{block}.{name}.bias"] = (features_out,)
        for norm in ("layernorm_before", "layernorm_after"):
            shapes[f"{block}.{norm}.weight"] = (width,)
            shapes[f"{block}.{norm}.bias"] = (width,)
    return shapes


def gelu_tanh(x):
    """The approximation (Hendrycks & Gimpel, 2016, §2), as in flax.linen.gelu."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    """The definition (ibid.), as in Hugging Face's "gelu"."""
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def google_logits(arrays, images, pool="cls"):
    """Logits of images, (batch, height, width, channels), from Google's arrays.

    With `pool="gap"`, the mean over the patches is read, and there is no class token.
    """
    p = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    size = p["embedding/kernel"].shape[0]
    x = np.stack([_patches(image, size) for image in images])
    x = np.einsum("blhwc,hwcd->bld", x, p["embedding/kernel"]) + p["embedding/bias"]
    if pool == "cls":
        token = np.repeat(p["cls"], len(images), axis=0)
        x = np.concatenate([token, x], axis=1)
    x = x + p["Transformer/posembed_input/pos_embedding"]
    layer = 0
    while f"Transformer/encoderblock_{layer}/LayerNorm_0/scale" in p:
        x = _google_block(p, f"Transformer/encoderblock_{layer}", x)
        layer += 1
    norm = "Transformer/encoder_norm"
    x = _layer_norm(x, p[f"{norm}/scale"], p[f"{norm}/bias"], 1e-6)
    x = x[:, 0] if pool == "cls" else x.mean(axis=1)
    return x @ p["head/kernel"] + p["head/bias"]


def _google_block(p, name, x):
    attention = f"{name}/MultiHeadDotProductAttention_1"
    norm = f"{name}/LayerNorm_0"
    y = _layer_norm(x, p[f"{norm}/scale"], p[f"{norm}/bias"], 1e-6)
    query, key, value = (
        np.einsum("bld,dhf->blhf", y, p[f"{attention}/{part}/kernel"])
        + p[f"{attention}/{part}/bias"]
        for part in ("query", "key", "value")
    )
    y = np.einsum(
        "blhf,hfd->bld", _attend(query, key, value), p[f"{attention}/out/kernel"]
    )
    x = x + y + p[f"{attention}/out/bias"]
    norm, mlp = f"{name}/LayerNorm_2", f"{name}/MlpBlock_3"
    y = _layer_norm(x, p[f"{norm}/scale"], p[f"{norm}/bias"], 1e-6)
    y = gelu_tanh(y @ p[f"{mlp}/Dense_0/kernel"] + p[f"{mlp}/Dense_0/bias"])
    return x + y @ p[f"{mlp}/Dense_1/kernel"] + p[f"{mlp}/Dense_1/bias"]


def hugging_face_logits(arrays, images, heads, gelu=gelu_erf, epsilon=1e-12):
    """Logits of images, (batch, height, width, channels), from Hugging Face's arrays.

    GELU and epsilon are by default those of `ViTConfig`.
    """
    p = {name: np.asarray(array, np.float64) for name, array in arrays.items()}

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, x):
        return _layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], epsilon)

    kernel = p["vit.embeddings.patch_embeddings.projection.weight"]
    x = np.stack([_patches(image, kernel.shape[-1]) for image in images])
    x = np.einsum("blhwc,dchw->bld", x, kernel)
    x = x + p["vit.embeddings.patch_embeddings.projection.bias"]
    token = np.repeat(p["vit.embeddings.cls_token"], len(images), axis=0)
    x = np.concatenate([token, x], axis=1) + p["vit.embeddings.position_embeddings"]
    layer = 0
    while f"vit.encoder.layer.{layer}.output.dense.weight" in p:
        name = f"vit.encoder.layer.{layer}"
        y = norm(f"{name}.layernorm_before", x)
        query, key, value = (
            linear(f"{name}.attention.attention.{part}", y).reshape(
                *y.shape[:2], heads, -1
            )
            for part in ("query", "key", "value")
        )
        y = _attend(query, key, value).reshape(y.shape)
        x = x + linear(f"{name}.attention.output.dense", y)
        y = gelu(
            linear(f"{name}.intermediate.dense", norm(f"{name}.layernorm_after", x))
        )
        x = x + linear(f"{name}.output.dense", y)
        layer += 1
    return linear("classifier", norm("vit.layernorm", x)[:, 0])


def interpolate(grid, size):
    """A square grid, (rows, columns, features), at `size` rows and columns.

    Bilinear, number by number, with the corners of both grids on each other.
    """
    old = len(grid)
    result = np.zeros((size, size, grid.shape[-1]))
    for row in range(size):
        for column in range(size):
            y, x = (_place(k, size, old) for k in (row, column))
            for i, weight in y:
                for j, other in x:
                    result[row, column] += weight * other * grid[i, j]
    return result


def _place(number, size, old):
    """Two neighbours in the old row of numbers, and their weights."""
    if size == 1:
        return [(0, 1.0)]
    whole, rest = divmod(number * (old - 1), size - 1)
    share = rest / (size - 1)
    return [(whole, 1 - share)] + [(whole + 1, share)] * (rest > 0)


def _patches(image, size):
    rows, columns = image.shape[0] // size, image.shape[1] // size
    return np.stack(
        [
            image[i * size : (i + 1) * size, j * size : (j + 1) * size]
            for i in range(rows)
            for j in range(columns)
        ]
    )


def _layer_norm(x, scale, bias, epsilon):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


def _attend(query, key, value):
    scores = np.einsum("bqhf,bkhf->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhf->bqhf", weights, value)
