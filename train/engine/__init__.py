"""Training steps, and the devices that run them."""
