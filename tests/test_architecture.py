"""Who may import whom, read from the syntax trees: nothing is imported to find out."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each part of bn_jax may import beside the standard library and itself.
ALLOWED = {
    "__init__": {"bn_jax.core"},
    "errors": set(),
    "core": {"jax"},
    "linen": {"bn_jax.core", "flax", "jax"},
    "nnx": {"bn_jax.core", "flax", "jax"},
    "xla": {"jax"},
    "surgery": {
        "bn_jax.core",
        "bn_jax.linen",
        "bn_jax.nnx",
        "bn_jax.xla",
        "flax",
        "jax",
        "numpy",
    },
    # Other frameworks for their types, and where somebody's model of theirs is run.
    "surgery.convert": {
        "bn_jax.core",
        "bn_jax.surgery",
        "equinox",
        "flax",
        "jax",
        "keras",
        "numpy",
        "torch",
    },
    "lab": {
        "optax",
        "pandas",
        "bn_jax",
        "absl",
        "flax",
        "jax",
        "matplotlib",
        "numpy",
        "orbax",
        "rich",
        "tensorboardX",
    },
    "lab.data": {
        "PIL",
        "absl",
        "grain",
        "jax",
        "numpy",
        "sklearn",
        "tensorflow_datasets",
    },
    "lab.models": {"bn_jax.linen", "flax", "jax"},
    "lab.training": {
        "bn_jax.core",
        "bn_jax.lab.data",
        "bn_jax.lab.statistics.records",
        "bn_jax.xla",
        "flax",
        "jax",
        "numpy",
        "optax",
        "orbax",
    },
    "lab.sweeps": {
        "bn_jax.lab.data",
        "bn_jax.lab.statistics.records",
        "bn_jax.lab.training",
        "bn_jax.xla",
        "jax",
        "numpy",
    },
    "lab.statistics": {"numpy", "scipy"},
    "lab.report": {"bn_jax.lab.statistics", "jinja2", "matplotlib", "numpy", "rich"},
}
FILES = sorted(
    str(path.relative_to(ROOT))
    for package in ("bn_jax", "experiments")
    for path in (ROOT / package).rglob("*.py")
)


def is_file_or_package(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def module_names(source: str, package: str):
    """What `source`, of a file in `package`, imports; imports inside functions count too."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                parts = (up if node.level else []) + ([node.module] if node.module else [])
                yield from (".".join([*parts, alias.name]) for alias in node.names)
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called),
                args=[ast.Constant(value=str(name)), *_],
            ) if called in ("import_module", "__import__"):
                yield name


def violations(file: str, source: str) -> list[str]:
    """The imports of `source`, of a file at path `file`, that the rule forbids."""
    path = Path(file)
    if path.parts[0] != "bn_jax":
        return []
    inner = path.parts[1] == "lab" or path.parts[1:3] == ("surgery", "convert")
    depth = 3 if inner and len(path.parts) > 3 else 2
    part = ".".join(path.parts[1:depth]).removesuffix(".py")
    part = "lab" if part == "lab.tools" else part
    if part not in ALLOWED:
        return [f"no rule for bn_jax.{part}: add one to ALLOWED"]
    allowed = ALLOWED[part] | {f"bn_jax.{part}"}
    if part != "core":
        allowed |= {"bn_jax.errors"}

    def permitted(name: str) -> bool:
        top, *rest = name.split(".")
        if top == "bn_jax" and not (rest and is_file_or_package(f"bn_jax.{rest[0]}")):
            # What the root re-exports is core's; inside core it would be a circle.
            return part != "core" and "bn_jax.core" in allowed
        return top in sys.stdlib_module_names or any(
            name == prefix or name.startswith(f"{prefix}.") for prefix in allowed
        )

    package = ".".join(path.parts[:-1])
    return [name for name in module_names(source, package) if not permitted(name)]


@pytest.mark.parametrize("file", FILES)
def test_imports(file):
    assert violations(file, (ROOT / file).read_text(encoding="utf-8")) == []


def test_the_files_are_found():
    assert "bn_jax/core/moments.py" in [Path(file).as_posix() for file in FILES]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("bn_jax/core/moments.py", "import numpy as np"),
        ("bn_jax/core/moments.py", "import jaxtyping"),
        ("bn_jax/core/moments.py", "from flax import linen"),
        ("bn_jax/core/moments.py", "def f():\n    import flax.linen as nn"),
        ("bn_jax/core/moments.py", "if TYPE_CHECKING:\n    from bn_jax import linen"),
        ("bn_jax/core/moments.py", "from .. import linen"),
        ("bn_jax/core/moments.py", "from ..linen import BatchNorm"),
        ("bn_jax/core/moments.py", "from bn_jax import Moments"),
        ("bn_jax/core/moments.py", "from bn_jax.errors import Refused"),
        ("bn_jax/core/moments.py", "importlib.import_module('flax')"),
        ("bn_jax/core/moments.py", "__import__('flax')"),
        ("bn_jax/__init__.py", "from bn_jax.linen import BatchNorm"),
        ("bn_jax/linen.py", "import optax"),
        ("bn_jax/nnx.py", "from bn_jax.linen import BatchNorm"),
        ("bn_jax/linen.py", "from experiments import compare"),
        ("bn_jax/lab/comparison.py", "from experiments import compare"),
        ("bn_jax/surgery/fold.py", "from bn_jax.lab.training import metrics"),
        ("bn_jax/lab/models/mlp.py", "from bn_jax.core.moments import moments"),
        ("bn_jax/lab/data/toy.py", "import tensorflow"),
        ("bn_jax/lab/training/loop.py", "from bn_jax.lab.models.mlp import MLP"),
        ("bn_jax/lab/training/loop.py", "from bn_jax.lab.sweeps import sweep"),
        ("bn_jax/lab/sweeps/sweep.py", "import matplotlib.pyplot as plt"),
        ("bn_jax/lab/report/page.py", "def f():\n    import jax.numpy as jnp"),
        ("bn_jax/lab/report/page.py", "import bn_jax.lab.training.metrics"),
        ("bn_jax/lab/report/page.py", "import bn_jax"),
        ("bn_jax/errors.py", "import jax"),
        ("bn_jax/new.py", ""),
    ],
)
def test_what_is_forbidden(file, source):
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("bn_jax/core/moments.py", "from __future__ import annotations\nimport math"),
        ("bn_jax/core/moments.py", "import jax.numpy as jnp\nfrom jax import lax"),
        ("bn_jax/core/moments.py", "from . import running\nfrom .running import ema"),
        ("bn_jax/linen.py", "from .core import moments\nfrom flax import linen"),
        ("bn_jax/surgery/fold.py", "from bn_jax import normalize\nimport bn_jax.linen"),
        ("bn_jax/lab/report/page.py", "from bn_jax.errors import Refused\nimport rich.table"),
        ("bn_jax/lab/comparison.py", "from bn_jax.lab import models\nimport absl.flags"),
    ],
)
def test_what_is_allowed(file, source):
    assert violations(file, source) == []
