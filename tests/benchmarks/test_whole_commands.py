"""Benchmarks that run whole commands, and the page that all of them make."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import all as every
from benchmarks import start, sweep
from bn_jax.data import load
from bn_jax.errors import UserError
from bn_jax.measure import timing


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


def test_ratios_to_a_peer_each_way():
    mine = sweep.Side(10, whole=[4.0, 5.0, 2.0], compiled=[1.0, 2.0, 1.0], accuracy=0.8)
    peer = sweep.Side(1, whole=[2.0, 2.0, 2.0], compiled=[0.5, 0.2, 0.3], accuracy=0.8)
    # Within the rounds 5, 4, 10; (2 + 9 x .5) / 4, (2 + 9 x .2) / 5, (2 + 9 x .3) / 2; 5, 1, 3.
    assert sweep.over(mine, peer) == pytest.approx({"whole": 5, "once": 1.625, "compiled": 3})


@pytest.fixture
def _peers(monkeypatch):
    pytest.importorskip("keras")
    monkeypatch.setattr(timing, "WARMUP", 1)
    with jax.numpy_rank_promotion("allow"):  # Keras needs it
        yield


@pytest.mark.long
@pytest.mark.usefixtures("_peers")
def test_a_sweep_beside_its_peers(capsys):
    ratios = sweep.run(sweep.Config(seeds=(1, 2), epochs=1, whole=False, repeats=1))
    assert list(ratios) == [
        f"{arm}, {runs} runs, {peer}, {way}"
        for arm in ("none", "bn")
        for runs in (5, 10)
        for peer in ("plain Flax", "Keras 3")
        for way in ("whole", "once", "compiled")
    ]
    assert all(ratio > 0 for ratio in ratios.values())
    assert "| bn, Keras 3 | 1 |" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.usefixtures("_peers")
def test_all_sides_of_a_sweep_learn_and_compile_once():
    dataset = load("circles", validation_fraction=sweep.VALIDATION, scaling="raw")
    sides = sweep.measure(dataset, "bn", sweep.Config(seeds=(2,), epochs=40, repeats=1))
    assert list(sides) == ["2", *sweep.PEERS]
    for side in sides.values():
        assert side.accuracy > 0.75  # the classes overlap: .84 in the end
        assert 0 < side.compiled[0] < side.whole[0] / 1.5


@pytest.mark.long
@pytest.mark.usefixtures("_peers")
def test_keras_starts_again_with_what_it_compiled():
    dataset = load("circles", validation_fraction=sweep.VALIDATION, scaling="raw")
    net = sweep.compiled_keras("bn")
    drawn = _weights(sweep.restarted(net, "bn"))
    sweep.keras_run(lambda: net, dataset, 1, 0)
    compiled, trained = net.train_function, _weights(net)
    again = _weights(sweep.restarted(net, "bn"))
    assert net.train_function is compiled
    for kernel in (0, 6):  # the first and the last of eight
        assert not np.any(again[kernel] == drawn[kernel])
        assert not np.any(again[kernel] == trained[kernel])
    for other in (1, 2, 3, 4, 5, 7):
        np.testing.assert_array_equal(again[other], drawn[other])
    assert not any(np.any(momentum.value) for momentum in net.optimizer.momentums)


def _weights(net):
    return [np.asarray(weight.value) for weight in net.weights]


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


def test_without_a_choice_all_run_that_can_anywhere(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(every, "printed", lambda name: called.append(name) or "")
    every.run(every.Config(out=str(tmp_path / "page.md")))
    assert called == [name for name in every.PROGRAMS if name not in every.ELSEWHERE]


def test_no_program_is_forgotten():
    """`network` measures nothing: docs/scaling.md has what it prints."""
    files = Path(every.__file__).parent.glob("*.py")
    programs = {file.stem for file in files if "__main__" in file.read_text()}
    assert programs == {*every.PROGRAMS, "all", "network"}


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
