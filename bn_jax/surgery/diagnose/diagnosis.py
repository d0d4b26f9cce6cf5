"""The whole examination."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax

from bn_jax.surgery.calls import BatchNorms
from bn_jax.surgery.diagnose.findings import Finding, worst_first
from bn_jax.surgery.diagnose.gap import check_gap
from bn_jax.surgery.diagnose.modes import modes
from bn_jax.surgery.diagnose.statistics import check_statistics
from bn_jax.surgery.diagnose.training import (
    check_biases,
    check_classes,
    check_decay,
    check_mode,
)
from bn_jax.surgery.diagnose.values import (
    check_activations,
    check_replicas,
    check_variables,
    flat_batch,
)
from bn_jax.surgery.diagnose.watch import Norm, joined, watch
from bn_jax.surgery.intercept import Model, known
from bn_jax.surgery.observe import Inputs


def diagnose(
    model: Model,
    variables: Any,
    *batches: Any,
    train: dict[str, Any] | None = None,
    evaluate: dict[str, Any] | None = None,
    optimizer: Any = None,
    replicated: bool = False,
    batch_norms: BatchNorms | None = None,
) -> list[Finding]:
    """What is wrong with the BatchNorm layers of a model, worst first.

        for finding in diagnose(model, variables, images, optimizer=tx):
            print(finding)

    The kinds, in their order, with the figure and what it is held against:

        nonfinite                    numbers that are not finite: variables, moments of a
                                     batch, or the first output: above 0
        negative_variance            the running variance: below 0
        unknown_layer                1 for a layer of another class with running statistics
        replicas_disagree            largest relative difference of devices' copies: above 0
        training_mode_in_evaluation  1 for a layer that normalises by the batch: above 0
        never_updated                share of features with mean 0 and variance 1: above 0
        train_evaluation_gap         change of the output by running statistics: above 0.7
                                     std, and twice what sampling gives; at the layer
                                     with which half of it is there
        stale                        nats between batch and running statistics: above 0.1,
                                     and 10 times what sampling gives
        half_precision               |mean|/std of half-precision input: above 1000
        too_few_elements             elements per feature of a batch or group: below 16
        dead_features                share with batch variance 0 or scale 0: above 0
        low_variance                 least variance in units of epsilon: below 10
        decayed_scale                share of scale that a step takes with gradients of 0:
                                     above 0
        useless_bias                 biases of a layer that a BatchNorm follows: above 0

    Those of one kind are in the order of their figures, equals and `nonfinite` in that of the
    first calls. Layers that use running statistics in training too are never stale. The model
    is compiled for each batch, twice more, and log2(layers) + 1 times where there is a gap.

    Args:
      model, variables: see `bn_jax.surgery`.
      *batches: of inputs, of the size that training has (on one device, for layers without
        axis_name): arrays, or tuples of positional arguments; not labels.
      train, evaluate: keywords of the model's call in training, `{"rngs": ...}` for instance,
        and in evaluation. `train`, `training`, `is_training`, `deterministic` and
        `use_running_average` are set where the call takes them; an NNX model that takes
        none of them is put into `train()` and `eval()`.
      optimizer: an `optax.GradientTransformation`, for `decayed_scale`; of a mask alone
        `optax.add_decayed_weights(1.0, mask)`.
      replicated: variables and batches have a first axis of replicas, as `jax.pmap` has.
      batch_norms: further classes of BatchNorms; see `Adapter`.

    Returns:
      Findings; an empty list for a healthy model, and for one without BatchNorm whose
      values are finite.

    Raises:
      ValueError: no batches; or a BatchNorm within `nn.scan`, `nn.vmap` or the like.
    """
    if not batches:
        raise ValueError("nothing to diagnose by: pass a batch of the model's inputs")
    findings = list(check_replicas(variables, replicated))
    replicas = 1
    if replicated:
        variables = jax.tree.map(lambda v: v[0], variables)
        batches, (replicas, *_) = zip(*map(flat_batch, batches), strict=True)
    inputs = [Inputs.of(batch).args for batch in batches]
    both = modes(model, variables, inputs[0], train, evaluate, known(batch_norms))
    findings += _examined(*both, variables, inputs, optimizer, replicas)
    return worst_first(findings)


def _examined(
    training, evaluation, variables, batches, optimizer, replicas
) -> Iterator[Finding]:
    runs = [watch(training, variables, inputs) for inputs in batches]
    in_evaluation = watch(evaluation, variables, batches[0])
    norms = [_share(n, replicas) for n in _all(runs)]

    yield from check_variables(variables)
    yield from check_activations([*runs, in_evaluation], variables)
    yield from check_classes(in_evaluation.strangers | runs[0].strangers)
    yield from check_mode(in_evaluation.norms.values())
    for norm in norms:
        yield from check_statistics(norm)
    yield from check_gap(training, variables, batches[0], runs[0].output, norms)
    if optimizer is not None:
        yield from check_decay(optimizer, variables, norms)
    yield from check_biases(training, variables, batches[0], norms)


def _all(runs) -> list[Norm]:
    """The layers, each of all batches."""
    paths = dict.fromkeys(path for run in runs for path in run.norms)
    found = ([run.norms[path] for run in runs if path in run.norms] for path in paths)
    return [functools.reduce(joined, norms) for norms in found]


def _share(norm: Norm, replicas: int) -> Norm:
    """With the elements that one replica has, or those that share with it."""
    layer = norm.layer
    if (groups := getattr(layer, "axis_index_groups", None)) is not None:
        sharing = min(map(len, groups))
    else:
        sharing = 1 if getattr(layer, "axis_name", None) is None else replicas
    return norm._replace(elements=norm.elements * sharing / replicas)
