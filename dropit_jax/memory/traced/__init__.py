"""Reports on traced functions: the residuals that differentiation stores."""
