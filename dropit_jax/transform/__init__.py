"""Any JAX function, storing less between its forward and its backward pass."""
