"""Reports on compiled programs: memory, operations, the largest batch that fits."""
