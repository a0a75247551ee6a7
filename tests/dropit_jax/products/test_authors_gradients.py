"""Gradients and losses against those that the authors' own code computed."""

import functools
import pathlib

import jax
import numpy as np
import optax
from absl.testing import absltest, parameterized
from jax import lax

from dropit_jax import DropIT, conv_general_dilated, dot_general

_AUTHORS = np.load(pathlib.Path(__file__).parents[1] / "data" / "authors_gradients.npz")

_NHWC = ("NHWC", "HWIO", "NHWC")


class AuthorsTest(parameterized.TestCase):
    """Against gradients that the authors' own PyTorch code computed."""

    @parameterized.product(
        layer=("dense", "conv3x3", "conv3x3_stride2", "conv1x1", "conv3x3_groups4"),
        rate=(0.5, 0.8, 0.9),
        encoding=("index", "bitmap"),
    )
    def test_gradients(self, layer, rate, encoding):
        x, kernel, bias, cotangent = (
            _AUTHORS[f"{layer}/{name}"] for name in ("x", "kernel", "bias", "cotangent")
        )
        policy = DropIT(rate, chunk_size=None, encoding=encoding)
        if layer == "dense":
            operation = functools.partial(
                dot_general, dimension_numbers=(((2,), (0,)), ((), ())), dropit=policy
            )
        else:
            stride, padding, dilation, groups = _AUTHORS[f"{layer}/geometry"].tolist()
            operation = functools.partial(
                conv_general_dilated,
                window_strides=(stride, stride),
                padding=((padding, padding),) * 2,
                rhs_dilation=(dilation, dilation),
                dimension_numbers=_NHWC,
                feature_group_count=groups,
                dropit=policy,
            )
        out, pullback = jax.vjp(lambda x, k, b: operation(x, k) + b, x, kernel, bias)
        actual = dict(
            zip(
                ("y", "grad_x", "grad_kernel", "grad_bias"),
                (out, *pullback(cotangent)),
                strict=True,
            )
        )
        for name, value in actual.items():
            expected = _AUTHORS[f"{layer}/rate_{rate}/{name}"]
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-5)

    @parameterized.parameters(0.0, 0.5, 0.8, 0.9)
    def test_losses_of_training(self, rate):
        x, labels = _AUTHORS["sgd/x"], _AUTHORS["sgd/labels"]
        params = [_AUTHORS[f"sgd/{name}"] for name in ("conv1", "conv2", "dense")]
        policy = DropIT(rate, chunk_size=None) if rate else None

        def loss_fn(params):
            conv1, conv2, dense = params
            same = {"padding": "SAME", "dimension_numbers": _NHWC}
            h = jax.nn.relu(lax.conv_general_dilated(x, conv1, (1, 1), **same))
            h = conv_general_dilated(h, conv2, (1, 1), **same, dropit=policy)
            h = jax.nn.relu(h).reshape(len(x), -1)
            logits = dot_general(h, dense, (((1,), (0,)), ((), ())), dropit=policy)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        optimizer = optax.sgd(0.05, momentum=0.9)

        @jax.jit
        def step(params, state):
            loss, gradients = jax.value_and_grad(loss_fn)(params)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(params, updates), state, loss

        state, losses = optimizer.init(params), []
        for _ in range(20):
            params, state, loss = step(params, state)
            losses.append(loss)
        np.testing.assert_allclose(
            losses, _AUTHORS[f"sgd/rate_{rate}/losses"], rtol=1e-4, atol=1e-6
        )


if __name__ == "__main__":
    absltest.main()
