"""The benchmarks: their names, folders and labels, and the choice of those that a run measures."""
