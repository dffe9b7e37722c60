"""Speed and memory compared with the reference code: `python -m benchmarks` (docs/explanation/performance.md)."""
