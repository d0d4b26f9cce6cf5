"""How well does a network learn ImageNet with BatchNorm, on one device or on many?

Trains a network on images that are read from disk and decoded as they are needed, one
network for each arm, every batch divided over all devices. The set is `imagenet2012` of
tensorflow-datasets, or another one of labelled images, prepared as array_record files.

The settings are those of Goyal et al. 2017 ("Accurate, Large Minibatch SGD"): 90 epochs, a
rate of 0.1 for 256 examples that grows with the batch, reached within 5 epochs; momentum
0.9, L2 of 1e-4 on kernels alone, the last scale of every block 0 at the start. Besides, as is
usual since: a cosine instead of three drops (`--schedule=goyal`), label smoothing of 0.1,
bfloat16 with statistics in float32.

A set that nothing is chosen on is both: what records call validation is the test set.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from experiments import flags, workdir
from experiments.conduct import seconds, start_jax
from experiments.imagenet_config import Config

EXPERIMENT = "imagenet"


def run(config: Config) -> dict[str, Any]:
    """Trains the arms, fills the workdir, prints the table; the summary comes back."""
    start = time.perf_counter()
    started = start_jax(config)
    import jax

    from bn_jax import measure, report
    from experiments import imagenet_arms as arms
    from experiments.epochs import workers

    sets = arms.open_sets(config)
    command = workdir.command(config, EXPERIMENT)
    config, networks = arms.build(config, sets)
    with workdir.entered(config, EXPERIMENT) as (folder, shared):
        if (finished := workdir.finished(shared)) is not None:
            return finished
        devices = [f"{d.platform}: {d.device_kind}" for d in jax.devices()]
        settings = workdir.write_config(
            folder, config, EXPERIMENT, devices,
            **started, command=command, workers=workers(config),
        )  # fmt: skip
        records = train(config, sets, networks, folder, shared)
        question = (
            f"How well does this {config.model} learn {config.dataset}? Tested on its split "
            f"{config.test_split}, on which nothing is chosen."
        )
        settings["seconds"] = seconds(records, time.perf_counter() - start)
        summary = {
            "experiment": EXPERIMENT, "question": question, "dataset": config.dataset,
            "model": config.model, "published": arms.rows(config, records),
            **measure.summarize(records, baseline=config.arms[0], target=config.target),
            "seconds": settings["seconds"],
        }  # fmt: skip
        report.write(records, summary, settings, folder, question)
        report.print_summary(summary)
        print(folder / "report.html")
        return summary


def train(
    config: Config, sets: Any, networks: dict[str, Any], folder: Path, shared: Path
) -> list[dict]:
    """The records of the arms, in the file as soon as their training has ended.

    An earlier start of the same run is gone on with where its last checkpoints were.
    """
    from bn_jax import report
    from bn_jax.training.signals import on_sigterm
    from experiments import imagenet_arms as arms
    from experiments.epochs import Training
    from experiments.position import Position
    from experiments.progress import Progress

    records = []
    with on_sigterm() as stop, Progress(config.steps * len(networks)) as progress:
        for name, network in networks.items():
            with contextlib.closing(_checkpoints(shared, name)) as checkpoints:
                found, compilation = checkpoints.newest(), 0.0
                if found and found.extra["ended"]:
                    position = Position(**found.extra)
                    progress.advance(config.steps)
                else:
                    progress.describe(f"{name}: compiling")
                    programs, compilation = arms.compiled(config, network)
                    progress.describe(name)
                    training = Training(
                        config, sets, programs, checkpoints, stop, progress.advance
                    )
                    position = training.run()
            records.append(arms.record(config, name, position, compilation))
            report.rewrite_records(folder / "records.jsonl", records).close()
    return records


def _checkpoints(shared, arm):
    from bn_jax.training.checkpoint import Checkpoints
    from experiments.epochs import BEST

    return Checkpoints(shared / "checkpoints" / arm, best=BEST)


if __name__ == "__main__":
    flags.main(Config, run)
