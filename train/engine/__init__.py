"""Training and evaluation steps, and the mesh of devices that runs them."""
