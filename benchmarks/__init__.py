"""Side-by-side timings; they need requirements-dev.txt. Run as `python -m benchmarks.<name>`."""
