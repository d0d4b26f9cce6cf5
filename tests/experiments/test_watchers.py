"""What is written for TensorBoard is what the records hold."""

import io
import json
import struct
from contextlib import redirect_stdout

import pytest

from experiments import compare

pytest.importorskip("tensorboardX")


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
    config = compare.Config(
        features=(4,), arms=("bn",), seeds=1, steps=20, eval_every=10, learning_rates=(0.3,),
        tensorboard=True, summary=True, workdir=str(tmp_path / "w"),
    )  # fmt: skip
    with redirect_stdout(io.StringIO()) as written:
        compare.run(config)
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
