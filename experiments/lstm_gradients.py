"""How much of the gradient reaches each step of a recurrent network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bn_jax.lab.report.plotting import SMALL, add_legend, arm_styles, new_figure, tidy
from bn_jax.lab.training.metrics import cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Norm of the gradient of the loss with respect to the hidden state of each step, root mean "
    "square over one batch, of one run of every arm. Backpropagation goes from right to left. "
    "Left before the first training step, right after the last."
)
ENDS = {"start": "before training", "end": "after training"}


def gradient_norms(
    model: nn.Module,
    variables: dict[str, Any],
    inputs: jax.Array,
    labels: jax.Array,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """How much of the gradient reaches the hidden state of each step, `[T]`.

        norm_t = sqrt(1/n sum_i |dL/dh_ti|^2),    L = sum_j loss_j

    with the statistics of the batch, as training sees it: a BatchNorm makes the loss of every
    example depend on the states of all. (Cooijmans et al. 2016, Figure 1a.)

    Args:
      model: in which the hidden state `[n, features]` goes through `perturb` within a scan of
        T steps, as that of `bn_jax.lab.models.LSTM` does, and nothing else goes through it.
      variables: `params`, and `batch_stats` if it has any.
      inputs, labels: `[n, ...]` as the model takes them, `[n]`.
      loss: (outputs, labels) to the loss of every example.
      key: of the model's dropout and noise.
    """

    def run(variables, *collections):
        return model.apply(
            variables, inputs, train=True, mutable=["batch_stats", *collections],
            rngs=None if key is None else {"dropout": key},
        )  # fmt: skip

    def total(perturbations):
        outputs, _ = run({**variables, "perturbations": perturbations})
        return loss(outputs, labels).sum()

    _, made = jax.eval_shape(lambda: run(variables, "perturbations"))
    zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), made["perturbations"])
    (gradient,) = jax.tree.leaves(jax.grad(total)(zeros))
    # A gradient that vanished is 1e-30, whose square is 0 in float32.
    largest = jnp.abs(gradient).max((1, 2), keepdims=True)
    unit = gradient / jnp.where(largest > 0, largest, 1)
    return largest[:, 0, 0] * jnp.sqrt((unit**2).sum(2).mean(1))


def gradients_through_time(
    norms: Mapping[str, Mapping[str, Sequence[float]]],
) -> Figure:
    """A panel before training and one after.

    Args:
      norms: by arm and end (`start`, `end`) those of the steps, ascending.
    """
    figure, styles = new_figure(height=3.4), arm_styles(norms)
    panels = figure.subplots(1, 2, sharey=True)
    for ax, (end, title) in zip(panels, ENDS.items(), strict=True):
        for arm, ends in norms.items():
            values = np.array(ends[end], float)
            steps = np.arange(1, len(values) + 1)
            every = max(len(values) // 7, 1)
            values = np.where(values > 0, values, np.nan)
            ax.plot(steps, values, markevery=every, label=arm, **styles[arm].line())
        tidy(ax, "step of the sequence")
        ax.set_yscale("log")
        ax.set_title(title, fontsize=SMALL + 1)
    panels[0].set_ylabel("norm of the gradient")
    add_legend(figure, panels[0])
    return figure
