"""The laboratory: what normalisation does to training, measured.

It needs more than the layers do: `pip install 'bn_jax[lab]'`.
"""

import importlib.util

_NEEDED = ("absl", "jinja2", "matplotlib", "orbax", "rich", "sklearn", "tensorflow_datasets")
if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ImportError(f"bn_jax.lab needs {', '.join(_missing)}: pip install 'bn_jax[lab]'")
