"""Primitives by their properties, as names.

A primitive in none of these sets is never computed twice, and what it makes is stored
if the backward pass reads it.
"""

# Products: linear in each of their two operands.
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})

# Each element of the result is some element of the (first) operand, as it is.
MOVES = frozenset(
    {
        "broadcast_in_dim",
        "concatenate",
        "copy",
        "dynamic_slice",
        "expand_dims",
        "gather",
        "iota",
        "name",
        "pad",
        "reshape",
        "rev",
        "slice",
        "split",
        "squeeze",
        "stack",
        "stop_gradient",
        "tile",
        "transpose",
        "unstack",
    }
)

# Of neighbouring elements neighbouring elements come: an error stays an error.
CONTINUOUS = frozenset(
    {
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "clamp",
        "complex",
        "conj",
        "convert_element_type",
        "cos",
        "cosh",
        "digamma",
        "div",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "imag",
        "integer_pow",
        "lgamma",
        "log",
        "log1p",
        "log2",
        "logistic",
        "max",
        "min",
        "mul",
        "neg",
        "one_minus_square",  # of JAX's own, in the derivative of `tanh`
        "pow",
        "real",
        "reduce_precision",
        "rsqrt",
        "select_n",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "sub",
        "tan",
        "tanh",
    }
)

# Of neighbouring elements anything may come.
STEPS = frozenset(
    {
        "and",
        "ceil",
        "clz",
        "eq",
        "eq_to",
        "floor",
        "ge",
        "gt",
        "is_finite",
        "le",
        "le_to",
        "lt",
        "lt_to",
        "ne",
        "nextafter",
        "not",
        "or",
        "population_count",
        "rem",
        "round",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "xor",
    }
)

# Sums and the like along axes; they read more than they make.
REDUCTIONS = frozenset(
    {
        "cumlogsumexp",
        "cummax",
        "cummin",
        "cumprod",
        "cumsum",
        "reduce_and",
        "reduce_max",
        "reduce_min",
        "reduce_or",
        "reduce_prod",
        "reduce_sum",
    }
)

# Additions, by which a residual stream goes on.
SUMS = frozenset({"add", "add_any", "sub"})

# What passes on the values of a mask that is added or put in.
LINEAR = (
    MOVES
    | SUMS
    | {"convert_element_type", "div", "max", "min", "mul", "neg", "reduce_max"}
)

# Without bound near zero: `div` of its divisor, `integer_pow` of a negative exponent.
QUOTIENTS = frozenset({"div", "integer_pow", "pow", "rsqrt"})

# Steep near zero, or at the ends of their range.
STEEP = frozenset(
    {
        "acos",
        "acosh",
        "asin",
        "atan2",
        "atanh",
        "digamma",
        "erf_inv",
        "lgamma",
        "log",
        "log1p",
        "log2",
        "sqrt",
    }
)

# Factors of matrices, and solutions with them.
DECOMPOSITIONS = frozenset(
    {
        "cholesky",
        "cholesky_update",
        "custom_linear_solve",
        "eig",
        "eigh",
        "geqp3",
        "geqrf",
        "hessenberg",
        "householder_product",
        "lu",
        "qr",
        "schur",
        "svd",
        "symmetric_product",
        "triangular_solve",
        "tridiagonal",
        "tridiagonal_solve",
    }
)

# Those that hold programs, whose residuals were chosen by a plan of their own.
BODIES = frozenset({"cond", "scan", "shard_map", "while"})
