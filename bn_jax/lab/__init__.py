"""The laboratory: what normalisation does to training, measured.

It needs more than the layers do: `pip install 'bn_jax[lab]'`.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bn_jax.lab.comparison import compare
    from bn_jax.lab.data import Dataset
    from bn_jax.lab.result import Comparison, join, load
    from bn_jax.lab.statistics import steps_to_target
    from bn_jax.lab.sweeps import sweep
    from bn_jax.lab.training.run import train

__all__ = [
    "Comparison",
    "Dataset",
    "compare",
    "join",
    "load",
    "steps_to_target",
    "sweep",
    "train",
]

_NEEDED = (
    "absl",
    "jinja2",
    "matplotlib",
    "orbax",
    "pandas",
    "rich",
    "sklearn",
    "tensorflow_datasets",
)
_HOMES = {
    "compare": "comparison",
    "Comparison": "result",
    "join": "result",
    "load": "result",
    "Dataset": "data",
    "steps_to_target": "statistics",
    "sweep": "sweeps.sweep",
    "train": "training.run",
}
if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ImportError(f"bn_jax.lab needs {', '.join(_missing)}: pip install 'bn_jax[lab]'")


def __getattr__(name: str) -> Any:
    """Imports what is asked for: a command's `--help` does not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"bn_jax.lab.{_HOMES[name]}"), name)
