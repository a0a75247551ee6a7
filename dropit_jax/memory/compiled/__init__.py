"""Reports on compiled programs: bytes, operations, the largest batch that fits."""
