"""Side-by-side timings, `python -m benchmarks.<name>`; they need requirements-dev.txt."""
