"""Arrays that may be differentiated once, and no more."""

import functools
from typing import Any, NoReturn

import jax
from jaxtyping import Array

from dropit_jax.compat import Primitive, ad, batching, mlir


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def once(x: Array, what: str) -> Array:
    """`x`, for a forward rule that caches something of it without a derivative.

    To differentiate the rule, which is to differentiate a second time, would leave out
    what reaches the gradient through the cache. A gradient that is detached
    (`jax.lax.stop_gradient`) nobody differentiates, though it stands in a function that
    is differentiated.

    Args:
      x: what the rule is given.
      what: the operation, as the error names it.

    Raises:
      TypeError: where its derivative is used.
    """
    del what
    return x


@once.defjvp
def _refused(what: str, primals: Any, tangents: Any) -> Any:
    (x,), (tangent,) = primals, tangents
    return once(x, what), _refused_p.bind(tangent, what=what)


def _refuse(*_: Any, what: str) -> NoReturn:
    raise TypeError(
        f"{what} has no second derivative (jax.hessian, jax.grad of jax.grad): what it "
        "caches for the first has none. Use the plain Flax layer or jax.nn function."
    )


# A tangent that nobody may compute or transpose; one that nothing reads JAX leaves out.
_refused_p = Primitive("second_derivative")
_refused_p.def_impl(_refuse)
_refused_p.def_abstract_eval(lambda tangent, **_: tangent)
ad.deflinear2(_refused_p, _refuse)
batching.defvectorized(_refused_p)
mlir.register_lowering(_refused_p, _refuse)
