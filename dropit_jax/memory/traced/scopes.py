"""Reads the names that JAX gives to operations.

JAX names an operation by the functions, the transformations and the `jax.named_scope`s
around it, and Flax opens a scope for each module:
`jit(step)/transpose(jvp(ResNet))/stage1_block1/conv1/conv_general_dilated`.
"""

import re
from collections.abc import Iterator

_WRAPPED = re.compile(r"(\w+)\((.*)\)")
_FUNCTIONS = frozenset({"jit", "pjit", "xla_call"})
# What control flow, JAX's transformations and `jnp.einsum` add to the path.
_CONTROL = re.compile(
    r".*->.*|while|cond|closed_call|call_exported|shard_map|branch_\d+_fun"
    r"|checkpoint|rematted_computation|remat2?|custom_[jv][vj]p_call\w*"
)
# A module's method other than `__call__`: module.method.
_METHOD = re.compile(r"\.[A-Za-z_]\w*$")


def layer(path: str) -> str:
    """The path of the Flax module that opened the scopes of a path.

    The model's own name is left out, but for what it computes outside its layers. ""
    for what is computed outside the model.
    """
    names: list[str] = []
    for name in _scopes(path):
        if names and name == names[0]:
            names = [name]  # a backward rule starts from the top again
        elif not names or name != names[-1]:  # a method that calls another one
            names.append(name)
    return "/".join(names[1:] or names)


def scopes(path: str) -> str:
    """The scopes of a path, the outermost first, separated by "/"."""
    return "/".join(_scopes(path))


def split(op_name: str) -> tuple[str, str]:
    """The path of the module that an operation is in, and the operation."""
    # XLA joins the names of operations that it made one.
    *scopes, operation = _components(op_name.rpartition(";")[2])
    return layer("/".join(scopes)), operation


def is_backward(op_name: str) -> bool:
    """Whether an operation is one of the backward pass, recomputation included."""
    return "transpose(" in op_name or "rematted_computation" in op_name


def _scopes(path: str) -> Iterator[str]:
    before = ""
    for component in _components(path):
        wrapped = _WRAPPED.fullmatch(component)
        if wrapped and wrapped[1] not in _FUNCTIONS:
            yield from _scopes(wrapped[2])
        elif not wrapped and not _is_control(component, before):
            yield _METHOD.sub("", component)
        before = component


def _is_control(component: str, before: str) -> bool:
    if before == "while" and component == "body":
        return True
    return not component or _CONTROL.fullmatch(component) is not None


def _components(path: str) -> list[str]:
    """The path split at the slashes outside parentheses."""
    components, depth = [""], 0
    for character in path:
        depth += (character == "(") - (character == ")")
        if character == "/" and depth == 0:
            components.append("")
        else:
            components[-1] += character
    return components
