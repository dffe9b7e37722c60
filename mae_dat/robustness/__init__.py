"""Measure classifiers on robustness benchmarks and report the results."""
