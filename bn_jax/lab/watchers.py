"""What looks on while a sweep trains: a note on the progress line, TensorBoard, weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bn_jax.errors import UserError
from bn_jax.lab.sweeps import Evaluation, Point
from bn_jax.lab.training.metrics import correct

Watch = Callable[[str, Evaluation], None]


def note(evaluation: Evaluation, steps_per_epoch: int | None = None) -> str:
    """ "step 300, loss 0.31, validation accuracy 93.1 %": medians over the runs.

    Where the steps of an epoch are given, "epoch 3, loss ...".
    """
    report = evaluation.report
    fine = report["diverged_at"] < 0
    if not fine.any() or not evaluation.step:
        return ""
    loss, accuracy = (
        np.nanmedian(report[k][fine]) for k in ("train_loss", "validation_accuracy")
    )
    if not np.isfinite(loss):
        return ""
    at = f"step {evaluation.step:,}"
    if steps_per_epoch:
        at = f"epoch {evaluation.step // steps_per_epoch:,}"
    if evaluation.run.metric is not correct:
        return f"{at}, loss {loss:.3g}, validation metric {accuracy:.3g}"
    return f"{at}, loss {loss:.3g}, validation accuracy {accuracy:.1%}"


@contextlib.contextmanager
def live(folder: Path | None) -> Iterator[Watch]:
    """A function that writes an arm's evaluations for TensorBoard; none of them without folder.

    One folder for each run: `tensorboard/<arm>/rate=0.1,seed=0`.

    Raises:
      UserError: tensorboardX is not installed.
    """
    if folder is None:
        yield lambda arm, evaluation: None
        return
    try:
        from tensorboardX import SummaryWriter  # which few have, and which takes a second
    except ImportError as e:
        raise UserError("--tensorboard: pip install tensorboardX") from e

    writers = {}

    def write(arm, evaluation):
        step, report = evaluation.step, evaluation.report
        for place, point, seed in evaluation.chunk.wanted:
            path = folder / "tensorboard" / arm / _run_name(point, seed)
            writer = writers.get(path) or SummaryWriter(str(path))
            writers[path] = writer
            for name, value in report.items():
                if name != "diverged_at" and (step or not name.startswith("train")):
                    writer.add_scalar(name, float(value[place]), step)
            writer.flush()

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()


def _run_name(point, seed):
    values = {
        "rate": point.learning_rate,
        "scale": point.init_scale,
        "momentum": point.momentum,
    }
    named = {k: v for k, v in values.items() if v is not None} | {"seed": seed}
    return ",".join(f"{k}={v:g}" for k, v in named.items())


class Weights:
    """Keeps the variables that runs end with: the last, or those that early stopping restores.

    Args:
      wanted: of which arms and seeds.

    Attributes:
      kept: `params` and `batch_stats` by (arm, `Point`, seed).
    """

    def __init__(self, wanted: Callable[[str, int], bool] = lambda arm, seed: True):
        self.kept: dict[tuple[str, Point, int], dict[str, Any]] = {}
        self._wanted = wanted

    def __call__(self, arm: str, evaluation: Evaluation) -> None:
        """To be a `watch` of `bn_jax.lab.comparison.run`."""
        for place, point, seed in evaluation.chunk.wanted:
            if self._wanted(arm, seed) and evaluation.kept[place]:
                train = evaluation.state(*place).train
                variables = {"params": train.params, "batch_stats": train.batch_stats}
                self.kept[arm, point, seed] = variables
