"""XLA's compiler, told what it does not see by itself: README.md says why."""
