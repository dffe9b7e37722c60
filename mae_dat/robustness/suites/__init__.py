"""The benchmarks: which exist, what their folders and labels look like, and which ones a run measures."""
