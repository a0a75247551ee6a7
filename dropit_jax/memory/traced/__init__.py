"""Reports on traced functions: the values that their derivative keeps."""
