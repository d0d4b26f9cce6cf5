"""Every flag of every experiment: values that make no sense are one line that names them."""

import dataclasses
import importlib
import os
from pathlib import Path

import jax.numpy as jnp
import pytest

from bn_jax.errors import UserError
from bn_jax.lab import arms, comparison, sizes
from bn_jax.lab.data import load
from bn_jax.lab.data.cache import default_cache_dir
from bn_jax.lab.data.tfds import resolve_data_dir
from bn_jax.lab.fields import PATHS, kinds
from bn_jax.lab.training.state import TrainState
from experiments import correctness

MODULES = [
    *(f"experiments.{path.stem}" for path in sorted(Path("experiments").glob("*.py"))
      if "flags.main(" in path.read_text()),
    *(f"bn_jax.lab.tools.{name}" for name in ("diagnose", "fold", "recalibrate")),
]  # fmt: skip
# 0 is a value of these, and of no other number.
ZERO = {
    "bn_group_size", "checkpoint_every", "decay_rate", "dropout", "dropouts", "ensemble", "l2",
    "l2s", "label_smoothing", "max_bad_examples", "momentum", "momentums", "seed", "translate",
    "validation_fraction", "warmup_epochs", "warmup_steps", "weight_decay", "workers",
}  # fmt: skip
# Held to the data, or to the other processes, before anything is trained.
LATER = {"num_processes", "process_id", "validation_fraction"}
NEEDED = {"model": "module:name", "checkpoint": "there", "inputs": "x.npy", "out": "new"}


def fields():
    """Module, name, type, and whether it is a list, of every flag."""
    for module in MODULES:
        for name, kind in kinds(importlib.import_module(module).Config).items():
            yield module, name, kind.item, kind.several


FIELDS = [*fields()]
NUMBERS = [field for field in FIELDS if field[2] in (int, float)]
assert len(NUMBERS) > 200


def make(module, name, value, several=False):
    config = importlib.import_module(module).Config
    needed = NEEDED if module.startswith("bn_jax") else {}
    needed = {f.name: needed[f.name] for f in dataclasses.fields(config) if f.name in needed}
    return config(**needed | {name: (value,) if several else value})


def refused(module, name, value, several=False):
    with pytest.raises(UserError) as raised:
        make(module, name, value, several)
    message = str(raised.value)
    assert f"--{name}" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("module", "name", "several"),
    [(e, name, several) for e, name, _, several in FIELDS if name in PATHS],
)
def test_paths_that_are_none(module, name, several):
    for value, text in (
        ("~nobody at all/x", "no such user"),
        (os.fsdecode(b"bad\xff/x"), r"bad\udcff/x: its full path is not UTF-8"),
        ("a\0b", "zero bytes"),
    ):
        assert text in refused(module, name, value, several)


def test_a_default_workdir_where_the_path_is_not_utf8(tmp_path, monkeypatch):
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    refused("experiments.compare", "workdir", None)


def test_paths_of_the_library(monkeypatch):
    """Without a home, as where a container's user has no name."""
    with pytest.raises(UserError, match="data_dir=~nobody"):
        resolve_data_dir("~nobody at all")
    with pytest.raises(UserError, match="cache_dir=~nobody"):
        load("digits", cache_dir="~nobody at all")
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(UserError, match="no such user, or none with a home"):
        default_cache_dir()


def test_a_document_that_is_a_folder(tmp_path):
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        correctness.Config(markdown=str(tmp_path))


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"features": (10**9,)}, r"--model=mlp --features=1000000000: that takes at least"),
        ({"model": "cnn", "features": (10**9, 10**9)}, "--features=1000000000,1000000000: "),
        ({"max_runs_at_once": 10**6, "seeds": 10**6, "features": (10**5,)},
         "--max_runs_at_once=1000000 "),
        ({"batch_size": 1}, "^--batch_size=1: one element .*; choose 2 or more, or --arms"),
        ({"bn_group_size": 1}, "^--bn_group_size=1: one element per feature"),
    ],
)  # fmt: skip
def test_networks_that_cannot_be(digits, given, message):
    config = comparison.Config(**given, parallel="single")
    with pytest.raises(UserError, match=message) as raised:
        arms.build_run(config, arms.norm_arms()["bn"], digits)
    assert "=True" not in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [{"steps": 2 * 10**9, "eval_every": 1}, {"seeds": 2 * 10**9}],
)
def test_records_that_do_not_fit(tmp_path, given):
    config = comparison.Config(**given, workdir=str(tmp_path / "w"))
    with pytest.raises(UserError, match=r"--steps=.* --eval_every=.* --seeds=.* at least"):
        comparison.run(config)
    assert not (tmp_path / "w").exists()


def test_what_fits_is_not_refused(monkeypatch):
    """To the byte: parameters of 12 bytes, their gradients, a momentum."""
    params = jnp.zeros(3)
    state = TrainState(params=params, batch_stats={}, opt_state=params, step=(), skipped=())
    monkeypatch.setattr(sizes, "_memory", lambda: 72)
    sizes.check_network("--x", state, 2)
    with pytest.raises(UserError, match="--x"):
        sizes.check_network("--x", state, 3)
    sizes.check_batch("--x", (8, 3, 3))
    with pytest.raises(UserError, match="--x"):
        sizes.check_batch("--x", (73,))


def test_epochs_beyond_the_largest_number_of_steps(digits):
    with pytest.raises(UserError, match="--epochs=2147483647: of 17 steps each"):
        arms.in_steps(comparison.Config(epochs=2**31 - 1), digits)
