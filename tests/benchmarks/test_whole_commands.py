"""Benchmarks that run whole commands, and the page that all of them make."""

import importlib
import importlib.util

import jax
import pytest

from benchmarks import all as every
from benchmarks import start, sweep
from bn_jax.errors import UserError


def test_a_start_without_programs_comes_before_one_with(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(start, "timed", lambda arguments: called.append(arguments) or 1.5)
    seconds = start.run(start.Config(rounds=3))
    assert all(times == [1.5] * 3 for times in seconds.values())
    first, again = (
        [i for i, a in enumerate(called) if a[-1].endswith(name)] for name in ("first", "again")
    )
    assert again == [i + 1 for i in first]
    assert len(first) == 4  # the first round does not count
    assert "| import bn_jax | 1.50 | 1.5 |" in capsys.readouterr().out


def test_commands_that_fail_are_errors():
    assert start.timed(("-c", "pass")) > 0
    with pytest.raises(start.subprocess.CalledProcessError):
        start.timed(("-c", "raise SystemExit(3)"))


def test_the_whole_sweep_twice(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(sweep, "timed", lambda arguments: called.append(arguments) or 12.0)
    assert sweep.whole(sweep.Config(starts=2)) == {"none kept": 12, "kept": 12}
    caches = [[a for a in arguments if "cache_dir" in a] for arguments in called]
    assert caches[0] == caches[1] != caches[2] == caches[3]
    assert "| none kept | 12.0 | 50.0 |" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="no Keras")
def test_a_sweep_beside_its_peers(capsys):
    with jax.numpy_rank_promotion("allow"):  # Keras needs it
        ratios = sweep.run(sweep.Config(seeds=(1, 2), epochs=1, whole=False, repeats=1))
    assert list(ratios) == [
        f"{arm}, {runs} runs, {peer}"
        for arm in ("none", "bn")
        for runs in (5, 10)
        for peer in ("plain Flax", "Keras 3")
    ]
    assert all(ratio > 0 for ratio in ratios.values())
    assert "| bn, Keras 3 | 1 |" in capsys.readouterr().out


def test_the_page_keeps_what_is_not_run_again(monkeypatch, tmp_path):
    out = tmp_path / "docs" / "performance.md"
    monkeypatch.setattr(every, "printed", lambda name: f"{name} printed\n")
    every.run(every.Config(only=("scaling", "gpu"), out=str(out)))
    monkeypatch.setattr(every, "printed", lambda name: f"{name} again\n")
    every.run(every.Config(only=("layer", "gpu"), out=str(out)))
    text = out.read_text()
    places = [text.index(part) for part in ("layer again", "scaling printed", "gpu again")]
    assert places == sorted(places)
    assert "gpu printed" not in text
    assert "python -m benchmarks.scaling --figure=docs/figures/scaling.png\n" in text
    assert "![scaling](figures/scaling.png)" in text


def test_without_a_choice_all_run_but_the_gpus(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(every, "printed", lambda name: called.append(name) or "")
    every.run(every.Config(out=str(tmp_path / "page.md")))
    assert called == [name for name in every.PROGRAMS if name != "gpu"]


@pytest.mark.parametrize("name", every.PROGRAMS)
def test_every_program_says_what_it_is(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.Config()
    assert module.__doc__.split("\n")[0].endswith((".", ":"))
    assert module.run


def test_errors_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="--only=nothing: choose from layer"):
        every.Config(only=("nothing",))
    monkeypatch.setattr(every, "command", lambda name: ["-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match=r"benchmarks\.input ended with exit status 3"):
        every.printed("input")
