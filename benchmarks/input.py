"""How fast data comes: from disk to the device, changed on the device, decoded from JPEG.

- The second start of a set that is cached: `bn_jax.data.load` until its arrays are on the
  device, in a process that has loaded it before.
- Augmentation beside the step of the network that it is for: CIFAR-10's network A.
- ImageNet's pipeline on JPEG files made here, 500 x 400 of 1/f noise, per core: decoding
  alone, with the centre crop, with the random one.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks.peers import ours
from benchmarks.peers.task import Task
from benchmarks.where import describe_machine
from bn_jax.data import augmentation, images, load
from bn_jax.errors import UserError
from bn_jax.measure.timing import interleave
from bn_jax.report.markdown import table
from bn_jax.report.text import whole
from bn_jax.training.xla import set_up
from experiments import flags
from experiments.flags import flag

FEATURES = (32, 64, 128, 512, 128)


@dataclasses.dataclass(frozen=True)
class Config:
    """See `python -m benchmarks.input --help`."""

    datasets: tuple[str, ...] = flag(("digits", "mnist", "cifar10"), "sets to load")
    data_dir: str | None = flag(None, "of tensorflow-datasets; else TFDS_DATA_DIR")
    batch: int = flag(256, "examples in a training step")
    images: int = flag(40, "JPEG files to decode")
    rounds: int = flag(7, "how often each is timed")


def loading(name: str, data_dir: str | None, rounds: int) -> float | None:
    """Seconds of a start that finds the set cached; None if the set is not there."""

    def start():
        dataset = load(name, data_dir=data_dir)
        return jax.block_until_ready([dataset.train, dataset.validation, dataset.test])

    try:
        start()
    except UserError as e:
        print(f"{name}: {e}")
        return None
    return statistics.median(interleave({"load": start}, rounds)["load"])


def augmented(batch: int, rounds: int) -> dict[str, float]:
    """Seconds of a step of network A, and of each augmentation of its batch."""
    task = Task("cifar_a", FEATURES, (32, 32, 3), batch, batch, augment=False)
    data, key = ours.data(task), jax.random.key(0)
    pixels = data.scaled(data.train.inputs)
    programs: dict[str, Callable[[], Any]] = {"step": ours.stepper(task)[1]}
    for names in (("shift", "flip"), ("shift", "flip", "distort")):
        change = jax.jit(augmentation(names))
        programs[", ".join(names)] = functools.partial(change, key, pixels)
    return {k: statistics.median(v) for k, v in interleave(programs, rounds).items()}


def decoding(count: int, rounds: int) -> dict[str, float]:
    """Images per second of one core."""
    files = [jpeg(seed) for seed in range(count)]
    rng = np.random.default_rng(0)
    ways = {
        "decoding alone": lambda f: np.asarray(Image.open(io.BytesIO(f)).convert("RGB")),
        "and the centre, 224 x 224": lambda f: images.for_evaluation(f, 224),
        "and a random part, 224 x 224": lambda f: images.for_training(f, 224, rng),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            for file in files:
                way(file)
            seconds[name].append(time.process_time() - start)
    return {name: count / statistics.median(s) for name, s in seconds.items()}


def jpeg(seed: int, height: int = 400, width: int = 500) -> bytes:
    """An image whose spectrum falls as that of photographs does, as a JPEG file."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / width)[..., None]
    noise = np.fft.rfft2(rng.normal(size=(height, width, 3)), axes=(0, 1)) / frequency
    pixels = np.fft.irfft2(noise, s=(height, width), axes=(0, 1))
    pixels = 128 + 50 * pixels / pixels.std()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=95)
    return file.getvalue()


def run(config: Config) -> None:
    """Prints three tables."""
    set_up()
    print(describe_machine("tensorflow-datasets", "pillow") + "\n")
    starts = {name: loading(name, config.data_dir, config.rounds) for name in config.datasets}
    rows = [[name, f"{seconds:.3f}"] for name, seconds in starts.items() if seconds is not None]
    print(table(["second start", "seconds until its arrays are on the device"], rows))
    found = augmented(config.batch, config.rounds)
    rows = [[k, f"{1e3 * s:.1f}", f"{s / found['step']:.1%}"] for k, s in found.items()]
    print(table([f"batch of {config.batch}", "ms", "share of the step"], rows))
    speeds = decoding(config.images, config.rounds)
    rows = [[name, whole(speed)] for name, speed in speeds.items()]
    print(table(["JPEG files of 500 x 400", "images/s of a core"], rows))


if __name__ == "__main__":
    flags.main(Config, run)
