"""Arrays stored in fewer bytes: chunks, selection, encodings, codes of few bits."""
