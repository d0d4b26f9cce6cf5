"""Equinox: a BatchNorm in (layer, state), as `equinox.nn.make_with_state` returns them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from bn_jax.surgery.convert import batch_norm
from bn_jax.surgery.convert.layers import is_a, single_count, stored_array

if TYPE_CHECKING:
    import equinox

AFFINE = {"weight": "scale", "bias": "bias"}


def layer_from_equinox(
    layer: tuple[equinox.nn.BatchNorm, equinox.nn.State],
) -> batch_norm.Read:
    """The fields of our BatchNorm and its variables, from an `equinox.nn.BatchNorm`.

    Its hidden averages become the statistics that it normalises by. Use as
    `layer_from_torch`: the batch is the inputs' first axis, in place of an `axis_name`.

    Args:
      layer: (layer, state), which may be a whole model's.

    Raises:
      ValueError: another layer; mode="ema", which normalises by its running statistics in
        training; or more names of axes than the batch's.
    """
    module, state = layer
    if is_a(module, {"BatchNorm": "BatchNorm"}) is None:
        raise ValueError(f"not a BatchNorm, but {type(module).__name__}")
    counter, averages = module.batch_counter, module.batch_state_index
    if module.mode != "batch" or counter is None or averages is None:
        raise ValueError(
            f"mode={module.mode!r} normalises by running statistics in training, as ours does "
            'not: use mode="batch"'
        )
    if isinstance(module.axis_name, tuple | list) and len(module.axis_name) > 1:
        raise ValueError(
            f"axis_name={module.axis_name}: convert a layer with the batch's name alone, and "
            "give ours the axis_name of the replicas"
        )
    affine = {ours: getattr(module, n) for n, ours in AFFINE.items()}
    count, hidden = state.get(counter), state.get(averages)
    debiasing = _debiasing(count, module.momentum)
    stats = {n: v / debiasing for n, v in zip(("mean", "var"), hidden, strict=True)}
    arrays = {n: stored_array(v, n) for n, v in (affine | stats).items() if v is not None}
    known = batch_norm.settings("equinox", momentum=module.momentum, epsilon=module.eps)
    return batch_norm.fields_and_variables(known, arrays | {"count": count})


def layer_to_equinox(layer: Any, variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keyword arguments of `equinox.nn.BatchNorm` but axis_name, its values).

    The values are weight and bias, and what `state.set` takes for `batch_counter` and
    `batch_state_index`.

    Arguments and errors as for `layer_to_torch`.
    """
    fields, arrays = batch_norm.carried(layer, variables, "equinox", affine=True)
    settings = {
        "input_size": arrays["mean"].size,
        "eps": fields["epsilon"],
        "momentum": fields["momentum"],
        "channelwise_affine": fields["use_scale"],
        "mode": "batch",
    }
    count = single_count(arrays["count"])
    debiasing = _debiasing(count, fields["momentum"])
    affine = {n: arrays[ours] for n, ours in AFFINE.items() if ours in arrays}
    hidden = tuple(arrays[n] * debiasing for n in ("mean", "var"))
    return settings, affine | {"batch_counter": int(count), "batch_state_index": hidden}


def _debiasing(count: jax.Array, momentum: float) -> jax.Array:
    """1 - momentum^t at update t, as rounded there; before the first nothing is divided."""
    return jnp.where(count == 0, 1, 1 - momentum**count)
