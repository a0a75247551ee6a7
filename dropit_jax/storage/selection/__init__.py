"""Choice of the elements and channels of an array that are kept."""
