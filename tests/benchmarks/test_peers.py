"""What all sides of a training benchmark do is the same, as far as it can be told."""

import jax
import numpy as np
import pytest

from benchmarks.peers import Task, flax_loop, ours, torch_loop

CNN = Task("cifar_a", (2, 3, 5, 4), (8, 8, 3), 12, 6, augment=True)
MLP = Task("mlp", (5, 4), (4, 4, 1), 12, 6)
# Kernels and biases, then scale and bias of the norms.
PARAMETERS = {
    "cifar_a": 3 * 9 * 2 + 2 * 9 * 2 + 2 * 9 * 3 + 3 * 9 * 3 + 12 * 5 + 5 * 4 + 4 * 10
    + (2 + 2 + 3 + 3 + 5 + 4 + 10) + 2 * (2 + 2 + 3 + 3 + 5),
    "mlp": 16 * 5 + 5 * 4 + 4 * 10 + 10 + 2 * (5 + 4),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("side", [ours, flax_loop, torch_loop], ids=lambda m: m.__name__)
@pytest.mark.parametrize("task", [CNN, MLP], ids=lambda t: t.network)
def test_the_network_and_its_training(side, task):
    if side is torch_loop:
        pytest.importorskip("torch")
    programs = side.prepare(task)
    assert programs["parameters"]() == PARAMETERS[task.network]
    programs["step"]()
    programs["epoch"]()
    programs["epoch"]()


@pytest.mark.parametrize("side", ["torch", "flax"])
def test_images_are_moved_as_ours(side):
    """Whole pixels, edges repeated, each image in a way of its own."""
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    many = np.repeat(image, 64, 0)
    if side == "torch":
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        images = torch_loop.moved(torch.from_numpy(many).movedim(-1, 1)).movedim(1, -1).numpy()
    else:
        images = np.asarray(flax_loop.moved(jax.random.key(0), many))
    padded = np.pad(image[0], ((3, 3), (3, 3), (0, 0)), mode="edge")
    cuts = [padded[i : i + 8, j : j + 8] for i in range(7) for j in range(7)]
    ways = np.stack([*cuts, *(cut[:, ::-1] for cut in cuts)])
    found = [int(np.argmax((ways == image).all((1, 2, 3)))) for image in images]
    assert all((ways[way] == image).all() for way, image in zip(found, images, strict=True))
    assert len(set(found)) > 30
