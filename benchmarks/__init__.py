"""Speed and memory, ours beside what the reference code does: `python -m benchmarks` (docs/explanation/performance.md)."""
