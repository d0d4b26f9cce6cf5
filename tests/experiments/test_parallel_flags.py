"""`--parallel` and `--bn_group_size`; tests/measure/test_parallel.py has the numbers."""

import json

import pytest

from bn_jax.errors import UserError
from experiments import compare

# Two steps and eight fake devices.
TINY = {
    "features": (8,), "seeds": 1, "learning_rates": (0.3,), "steps": 2, "eval_every": 2,
    "batch_size": 64, "arms": ("bn",), "train_examples": 128,
}  # fmt: skip


def losses(folder, **flags):
    compare.run(compare.Config(**TINY, workdir=str(folder), **flags))
    records = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    return [loss for r in records for loss in (r["train_loss"][-1], r["test_loss"][-1])]


@pytest.mark.long
def test_the_group_and_not_the_number_of_devices_decides(tmp_path):
    alone = losses(tmp_path / "a", parallel="single", bn_group_size=16)
    # Eight devices of eight examples: a group is of two of them.
    assert losses(tmp_path / "b", parallel="pmap", bn_group_size=16) == pytest.approx(alone)
    whole = losses(tmp_path / "c", parallel="single")
    assert abs(whole[0] - alone[0]) > 1e-4
    device = losses(tmp_path / "d", parallel="shard_map", bn_group_size=0)
    eight = losses(tmp_path / "e", parallel="jit", bn_group_size=8)
    assert device == pytest.approx(eight)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"parallel": "gird"}, "--parallel=gird: choose from auto"),
        ({"parallel": "pmap", "bn_group_size": 12}, "8 devices have 8 examples each"),
        ({"bn_group_size": -1}, "--bn_group_size=-1"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        losses(tmp_path / "w", **flags)
