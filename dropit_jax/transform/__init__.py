"""Any JAX function, storing less between its forward and its backward pass.

One file for each step:

- `program`: what JAX traced, as a flat list of equations.
- `rules`: loops with bodies that are transformed first; max-pooling.
- `split`: the forward and the backward pass of JAX's own derivative.
- `classify`: what an error in each forward value would do to the gradients.
- `prices`, `cut`, `planner`: which values are stored, and which computed again.
- `presets`, `storage`, `orders`: how values are stored, and how they lie in memory.
- `rewrite`, `rebuild`: the two passes as they run.
- `differentiate`, `drop`, `plan`: the function of the user, and its report.
"""
