"""Any JAX function, storing less between its forward and its backward pass.

A folder for each step, which knows the ones before it:

- `tracing`: the function as flat equations, and JAX's own derivative of it in two
  passes; loops with bodies that are transformed first.
- `forms`: how values are stored, and how they lie in memory; the presets.
- `planning`: the class of each value, the prices, the cut.
- `passes`: the two passes as they run.

On top, `differentiate` joins them, `drop` is the function of the user, and `plan` its
report.
"""
