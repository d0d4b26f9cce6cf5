"""What looks on while runs train sees what the records hold."""

import functools
import io
import json
import struct
from contextlib import redirect_stdout

import numpy as np
import optax
import pytest

from bn_jax.lab import comparison
from bn_jax.lab.data import batch_indices, load
from bn_jax.lab.models import MLP
from bn_jax.lab.sweeps import Budget, Point, sweep
from bn_jax.lab.training.metrics import correct
from bn_jax.lab.training.run import Run, Swept
from bn_jax.lab.watchers import Weights
from bn_jax.linen import BatchNorm


def events(path):
    """The scalars of an event file, [(tag, step, value)], read by its own framing."""
    from tensorboardX.proto.event_pb2 import Event

    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + size])
        found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        at += 16 + size
    return found


def test_tensorboard_has_what_the_records_have(tmp_path):
    pytest.importorskip("tensorboardX")
    config = comparison.Config(
        features=(4,), arms=("bn",), seeds=1, steps=20, eval_every=10, learning_rates=(0.3,),
        tensorboard=True, summary=True, workdir=str(tmp_path / "w"),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as written:
        comparison.run(config)
    (record,) = map(json.loads, (tmp_path / "w/records.jsonl").read_text().splitlines())
    (folder,) = (tmp_path / "w/tensorboard/bn").iterdir()
    assert folder.name == "rate=0.3,scale=1,momentum=0.9,seed=0"
    scalars = events(next(folder.iterdir()))
    for name in ("train_loss", "validation_accuracy", "test_loss"):
        expected = [
            (name, step, pytest.approx(value, abs=1e-5))
            for step, value in zip(record["steps"], record[name], strict=True)
            if value is not None
        ]
        assert [s for s in scalars if s[0] == name] == expected
    assert "BatchNorm_0" in written.getvalue()
    assert "Total Parameters" in written.getvalue()


@pytest.mark.long
def test_weights_are_those_of_the_record():
    dataset = load("circles")

    def model(swept):
        return MLP((6,), 1, norm=functools.partial(BatchNorm, momentum=swept.momentum))

    def batches(key, first_step, num_steps):
        return batch_indices(key, first_step, num_steps, dataset.train.labels.size, 32)

    run = Run(model, optax.sgd, dataset.scaled, batches)
    points, kept = [Point(0.1, 1.0, 0.9), Point(0.3, 1.0, 0.9)], Weights()
    (found,) = sweep(
        run, dataset, points, [3, 4], Budget(40, 20), on_evaluation=lambda e: kept("bn", e)
    )
    assert len(kept.kept) == 4
    for record in found:
        outputs = run.model(Swept(*record.point)).apply(
            kept.kept["bn", record.point, record.seed], dataset.scaled(dataset.test.inputs),
            train=False,
        )  # fmt: skip
        right = np.mean(correct(outputs, dataset.test.labels))
        np.testing.assert_allclose(right, record.test_accuracy[-1], atol=2e-3)
