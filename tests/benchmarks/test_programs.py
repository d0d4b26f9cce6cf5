"""What all programs of `benchmarks/` share: they run at tiny sizes, and make one page."""

import importlib
import re
from pathlib import Path

import pytest

from benchmarks import accumulate, layer, machine, passes, start, tricks
from benchmarks import all as every
from bn_jax.errors import UserError

# Flags that make each small.
TINY = {
    "accumulate": {"models": ("mlp",), "batch": 8, "size": 2, "micro_batches": (2,)},
    "cnn_step": {
        "sides": ("bn_jax",),
        "features": (2, 3, 5, 4),
        "image": 8,
        "batch": 6,
        "images": 12,
    },
    "fold": {"batch_sizes": (1,)},
    "layer": {"shapes": ("4x3x2x5",), "dtypes": ("bfloat16",)},
    "mlp_steps": {
        "sides": ("bn_jax", "plain Flax"),
        "features": (5, 4),
        "batch": 6,
        "images": 12,
        "runs": 2,
    },
    "sweep": {"seeds": 2, "epochs": 1, "starts": 0},
    "tricks": {
        "shape": (4, 4, 4, 2),
        "small": 2,
        "width": 4,
        "features": (2, 3, 2),
        "runs": 2,
        "epochs": 2,
        "steps": 2,
        "batch": 4,
    },
}


@pytest.mark.long
@pytest.mark.parametrize("name", TINY)
def test_a_program_prints_a_table_of_numbers(name, capsys, monkeypatch):
    monkeypatch.setattr(tricks, "CNN", tricks.CNN._replace(images=8, batch=4))
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(machine, "MATRIX", 8)
    assert module.run(module.Config(**TINY[name], rounds=1))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) > 2
    assert all(re.search(r"\d", row) for row in rows if ":--" not in row and row != rows[0])


@pytest.mark.long
def test_one_form_of_accumulation_is_exact_and_the_other_is_not():
    found = accumulate.run(accumulate.Config(**TINY["accumulate"], rounds=1))
    whole, own, exact = found["mlp"]
    assert whole == 0
    assert exact < 1e-5 < 1e-2 < own


def test_commands_that_fail_are_errors():
    assert start.timed(("-c", "pass")) > 0
    with pytest.raises(start.subprocess.CalledProcessError):
        start.timed(("-c", "raise SystemExit(3)"))


def test_the_page_keeps_what_is_not_run_again(monkeypatch, tmp_path):
    out = tmp_path / "docs" / "performance.md"
    monkeypatch.setattr(every, "section", lambda name: f"{name} printed\n")
    every.run(every.Config(only=("sweep", "gpu"), out=str(out)))
    monkeypatch.setattr(every, "section", lambda name: f"{name} again\n")
    every.run(every.Config(only=("layer", "gpu"), out=str(out)))
    text = out.read_text()
    places = [text.index(part) for part in ("layer again", "sweep printed", "gpu again")]
    assert places == sorted(places)
    assert "gpu printed" not in text


def test_no_program_is_forgotten():
    """`network` measures nothing: docs/scaling.md has what it prints."""
    files = Path(every.__file__).parent.glob("*.py")
    programs = {file.stem for file in files if "__main__" in file.read_text()}
    assert programs == {*every.PROGRAMS, "all", "network"}


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (layer.Config, {"dtypes": ("int8",)}, "none of float32"),
        (accumulate.Config, {"models": ("rnn",)}, "'rnn' is none of mlp, cnn"),
        (every.Config, {"only": ("nothing",)}, "choose from layer"),
        (passes.Config, {"devices": ("h100",)}, "choose from h200, v5e"),
    ],
)
def test_refusals(config, wrong, message):
    with pytest.raises(UserError, match=message):
        config(**wrong)
