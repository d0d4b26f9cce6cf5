"""Formulas on arrays: pure functions that import nothing but jax."""
