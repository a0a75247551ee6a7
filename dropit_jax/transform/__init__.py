"""`drop` makes any JAX function store fewer bytes of residuals.

One folder a step; each folder imports only from the folders above it:

- `tracing` flattens the function into equations, transforms the bodies of loops, and
  splits JAX's own derivative into a forward and a backward pass.
- `forms` says how residuals are stored and laid out in memory, and holds the presets.
- `planning` classifies forward values, prices them, and cuts the graph.
- `passes` runs the forward and the backward pass.

`differentiate` joins the steps, `drop` is the user's entry point, and `plan` reports
what is stored.
"""
