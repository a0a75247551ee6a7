"""A function as JAX traces it, taken apart into its forward and its backward pass."""
