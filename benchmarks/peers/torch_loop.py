"""torch's side: eager, its arrays in memory with the channels last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.peers import CLASSES, SHIFT, Task


def prepare(task: Task) -> dict[str, Callable[[], Any]]:
    """The programs."""
    import torch

    net = network(task).to(memory_format=torch.channels_last)
    make = torch.optim.SGD if task.sgd else torch.optim.Adam
    optimizer, loss_of = make(net.parameters(), task.learning_rate), torch.nn.CrossEntropyLoss()
    images, labels = (torch.from_numpy(v) for v in task.examples())
    images, labels = images.permute(0, 3, 1, 2), labels.long()

    def update(x, y):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    batch = unit(images[: task.batch]), labels[: task.batch]

    def step():
        return update(*batch)

    def epoch():
        order = torch.randperm(task.images)
        for rows in order[: task.steps * task.batch].split(task.batch):
            x = unit(images[rows])
            loss = update(moved(x) if task.augment else x, labels[rows])
        return loss

    count = sum(v.numel() for v in net.parameters())
    return {"step": step, "epoch": epoch, "parameters": lambda: count}


def network(task: Task) -> Any:
    """BatchNorm before each sigmoid of an MLP, after each ReLU of network A."""
    from torch import nn

    layers, (height, width, channels) = [], task.image
    if task.sgd:
        size = height * width * channels
        layers.append(nn.Flatten())
        for n in task.features:
            layers += [nn.Linear(size, n, bias=False), nn.BatchNorm1d(n), nn.Sigmoid()]
            size = n
        return nn.Sequential(*layers, nn.Linear(size, CLASSES))
    *blocks, dense, last = task.features
    for c in blocks:
        for _ in range(2):
            layers += [nn.Conv2d(channels, c, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(c)]
            channels = c
        layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]
        height, width = height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(height * width * channels, dense), nn.ReLU()]
    layers += [nn.BatchNorm1d(dense), nn.Dropout(0.5), nn.Linear(dense, last), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(last, CLASSES))


def unit(images: Any) -> Any:
    """uint8 to float32 in [0, 1], the channels last in memory."""
    import torch

    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


def moved(x: Any) -> Any:
    """Each image shifted by up to `SHIFT` pixels, and mirrored or not."""
    import torch

    n, _, height, width = x.shape
    x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.flip(3), x)
    padded = torch.nn.functional.pad(x, (SHIFT,) * 4, mode="replicate").permute(0, 2, 3, 1)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, n, 1, 1))
    rows = top + torch.arange(height).view(1, -1, 1)
    columns = left + torch.arange(width).view(1, 1, -1)
    return padded[torch.arange(n).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2)
