"""One training step, and a run made of steps, as pure functions."""
