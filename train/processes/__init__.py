"""Several processes that train one model together, and the signals they receive."""
