"""Products that cache a compressed first operand."""
