"""Matrix products and convolutions that store their first operand compressed."""
