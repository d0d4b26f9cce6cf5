"""The package as users install it: a light library, and a laboratory as an extra.

`.ci/run` installs the wheel into an environment of its own, without the extra and with it.
"""

import importlib
import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {line for line in lines if line and not line.startswith("-r")}


def test_extras_are_the_requirement_files():
    extras = PROJECT["optional-dependencies"]
    assert required("requirements.txt") == {*PROJECT["dependencies"], *extras["lab"]}
    assert required("requirements-dev.txt") == set(extras["dev"])


def test_the_laboratory_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "bn_jax.lab", raising=False)
    with pytest.raises(ImportError) as e:
        importlib.import_module("bn_jax.lab")
    assert str(e.value) == (
        "bn_jax.lab needs absl, jinja2, matplotlib, orbax, pandas, rich, sklearn, "
        "tensorflow_datasets: pip install 'bn_jax[lab]'"
    )
