"""The processes that train one model together, and the signals that they get."""
