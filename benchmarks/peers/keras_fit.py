"""Keras' side, on the backend that KERAS_BACKEND names: `train_on_batch` and `fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers import CLASSES, SHIFT, Task


def prepare(task: Task) -> dict[str, Callable[[], Any]]:
    """The programs; images are moved by Keras' own layers."""
    import keras

    images, labels = task.examples()
    net = network(task)
    make = keras.optimizers.SGD if task.sgd else keras.optimizers.Adam
    full = keras.Sequential([keras.Input(task.image), *changes(task), net])
    for model in (net, full):
        model.compile(
            optimizer=make(task.learning_rate),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    x, y = images[: task.batch].astype(np.float32) / 255, labels[: task.batch]
    rows = task.steps * task.batch

    def step():
        return net.train_on_batch(x, y)

    def epoch():
        return full.fit(images[:rows], labels[:rows], batch_size=task.batch, verbose=0)

    return {"step": step, "epoch": epoch}


def changes(task: Task) -> list[Any]:
    """From bytes to numbers in [0, 1], moved and mirrored."""
    from keras import layers

    share = SHIFT / task.image[0]
    moves = [layers.RandomTranslation(share, share, "nearest"), layers.RandomFlip("horizontal")]
    return [layers.Rescaling(1 / 255), *(moves if task.augment else [])]


def network(task: Task) -> Any:
    """BatchNorm before each sigmoid of an MLP, after each ReLU of network A."""
    import keras
    from keras import layers

    def norm():
        return layers.BatchNormalization(momentum=0.9)

    parts: list[Any] = [keras.Input(task.image)]
    if task.sgd:
        parts.append(layers.Flatten())
        for n in task.features:
            parts += [layers.Dense(n, use_bias=False), norm(), layers.Activation("sigmoid")]
        return keras.Sequential([*parts, layers.Dense(CLASSES)])
    *blocks, dense, last = task.features
    for c in blocks:
        for _ in range(2):
            parts += [layers.Conv2D(c, 3, padding="same", activation="relu"), norm()]
        parts += [layers.MaxPooling2D(), layers.Dropout(0.25)]
    parts += [layers.Flatten(), layers.Dense(dense, activation="relu"), norm()]
    parts += [layers.Dropout(0.5), layers.Dense(last, activation="relu")]
    return keras.Sequential([*parts, layers.Dense(CLASSES)])
