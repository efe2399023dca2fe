"""What measures: `python -m tools.bench PART`, and `python -m tools.bench.NAME` for the others. docs/performance.md."""
