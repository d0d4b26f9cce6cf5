"""One training task in bn_jax, a plain Flax loop, torch and Keras, each in its own process.

A side is a function from a `Task` to its programs: `step` trains on one batch that is where
the computation is; `epoch` trains on all images once, from bytes in memory. Each ends when the
numbers are there.
"""
