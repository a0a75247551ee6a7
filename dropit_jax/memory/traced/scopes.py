"""Parses the names that JAX gives to operations.

The name of an operation is the path of the functions, transformations and
`jax.named_scope`s around it, and Flax opens a scope for each module:
`jit(step)/transpose(jvp(ResNet))/stage1_block1/conv1/conv_general_dilated` is in the
layer `stage1_block1/conv1`.
"""

import re
from collections.abc import Iterator

_WRAPPED = re.compile(r"(\w+)\((.*)\)")
_FUNCTIONS = frozenset({"jit", "pjit", "xla_call"})
# Components that control flow, JAX's transformations and `jnp.einsum` add to a path.
_CONTROL = re.compile(
    r".*->.*|while|cond|eval_jaxpr|closed_call|call_exported|shard_map|branch_\d+_fun"
    r"|checkpoint|rematted_computation|remat2?|custom_[jv][vj]p_call\w*"
)
# A method other than `__call__`: Flax opens the scope `module.method`.
_METHOD = re.compile(r"\.[A-Za-z_]\w*$")


def layer_of(path: str) -> str:
    """Returns the path of the Flax module around an operation: "jvp(Net)/a/b" -> "a/b".

    The argument is the name of the operation without its last component.

    Returns the model's name for an operation of the model outside its layers, and ""
    outside the model.
    """
    names: list[str] = []
    for name in _scopes(path):
        if names and name == names[0]:
            names = [name]  # a backward rule repeats the path from the model on
        elif not names or name != names[-1]:  # a method calls another one
            names.append(name)
    return "/".join(names[1:] or names)


def scope_path(path: str) -> str:
    """Returns the scopes and modules of a path: "jit(f)/jvp(Net)/a" -> "Net/a"."""
    return "/".join(_scopes(path))


def layer_and_operation(op_name: str) -> tuple[str, str]:
    """Returns an operation's layer and own name: "jvp(Net)/a/add" -> ("a", "add")."""
    # XLA joins the names of operations that it fused by ";".
    *scopes, operation = _components(op_name.rpartition(";")[2])
    return layer_of("/".join(scopes)), operation


def is_backward(op_name: str) -> bool:
    """Returns whether an operation is of the backward pass, recomputation included."""
    return "transpose(" in op_name or "rematted_computation" in op_name


def _scopes(path: str) -> Iterator[str]:
    """Yields the names of named scopes and Flax modules in a path."""
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
    """Splits a path at the slashes outside parentheses: "jvp(a/b)/c" has two parts."""
    components, depth = [""], 0
    for character in path:
        depth += (character == "(") - (character == ")")
        if character == "/" and depth == 0:
            components.append("")
        else:
            components[-1] += character
    return components
