"""Files, processes' children, text and the terminal."""
