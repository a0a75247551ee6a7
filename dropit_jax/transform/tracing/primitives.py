"""Sets of names of JAX primitives with a common property.

A primitive in none of the sets is never recomputed: its results are stored if the
backward pass reads them.
"""

# Linear in each of their two operands.
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})

# Each element of the result is an unchanged element of an operand, or a constant.
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

# Continuous elementwise functions: a small error of an operand is one of the result.
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
        "one_minus_square",  # private to JAX, in the derivative of `tanh`
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

# Discontinuous elementwise functions: a small error may change the result completely.
DISCONTINUOUS = frozenset(
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

# Reductions and cumulative reductions along axes.
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

# Elementwise additions, by which masks are added too.
ADDITIONS = frozenset({"add", "add_any", "sub"})

# Pass on the large numbers of a mask.
PASS_MASKS = (
    MOVES
    | ADDITIONS
    | {"convert_element_type", "div", "max", "min", "mul", "neg", "reduce_max"}
)

# Unbounded near zero: `div` in its divisor, `integer_pow` for a negative exponent.
QUOTIENTS = frozenset({"div", "integer_pow", "pow", "rsqrt"})

# Of unbounded slope near zero, or at the ends of their domain.
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

# Factor matrices, or solve linear systems.
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

# Return their operands unchanged, each as one result.
BARRIERS = frozenset({"optimization_barrier", "optimization_barrier_by_platform"})

# Linear in all floating-point operands together: the result is zero if all are.
JOINTLY_LINEAR = ADDITIONS | {
    "complex",
    "concatenate",
    "device_put",
    "dynamic_update_slice",
    "pad",
    "psum",
    "psum2",
    "psum_invariant",
    "pvary",
    "scatter",
    "scatter-add",
    "scatter-sub",
    "scatter_add",
    "select_n",
    "stack",
}

# Linear in the first operand: the result is zero if it is.
LINEAR_IN_FIRST = frozenset({"div", "select_and_gather_add", "select_and_scatter_add"})

# Linear in each floating-point operand: the result is zero if one of them is.
MULTILINEAR = (
    PRODUCTS
    | (MOVES - JOINTLY_LINEAR)
    | {
        "all_gather",
        "all_gather_invariant",
        "all_gather_reduced",
        "all_to_all",
        "conj",
        "convert_element_type",
        "copy_p",
        "cumsum",
        "fft",
        "imag",
        "join_sharding_group",
        "layout_constraint",
        "mul",
        "neg",
        "pbroadcast",
        "ppermute",
        "ragged_dot_general",
        "real",
        "reduce_precision",
        "reduce_scatter",
        "reduce_sum",
        "reduce_window_sum",
        "reshard",
        "sharding_constraint",
        "with_memory_space_constraint",
        "xla_metadata_value",
    }
)

# Contain programs, whose residuals plans of their own choose.
BODIES = frozenset({"cond", "scan", "shard_map", "while"})
