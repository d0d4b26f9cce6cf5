"""Haiku: a BatchNorm in (params, state), as `init` of `transform_with_state` returns them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bn_jax.surgery.convert import batch_norm
from bn_jax.surgery.convert.layers import single_count, stored_array

AVERAGES = {"mean_ema": "mean", "var_ema": "var"}
AFFINE = {"scale": "scale", "offset": "bias"}
FIELDS = {
    "eps": "epsilon",
    "cross_replica_axis": "axis_name",
    "cross_replica_axis_index_groups": "axis_index_groups",
}
Tree = Mapping[str, Mapping[str, Any]]


def layer_from_haiku(layer: tuple[Tree, Tree], **settings: Any) -> batch_norm.Read:
    """The fields of our BatchNorm and its variables, from a `haiku.BatchNorm`.

    Its averages are ours, its counter the count of every feature. Use as `layer_from_torch`.
    A layer of a larger model is what these have of it: `{name: params[name]}` and the state
    whose keys begin with the name.

    Args:
      layer: (params, state) of a model that is this layer, or of one with it alone.
      **settings: what it was constructed with: decay_rate; eps, data_format,
        cross_replica_axis and cross_replica_axis_index_groups if they were given.

    Raises:
      ValueError: another layer, or another setting.
    """
    known = ("decay_rate", *FIELDS, "data_format")
    if "decay_rate" not in settings or not settings.keys() <= set(known):
        raise ValueError(
            f"settings {', '.join(settings) or 'none'}: give decay_rate and, of "
            f"{', '.join(known[1:])}, what the layer was constructed with"
        )
    params, state = layer
    averages = {key.rpartition("/~/")[2]: entry for key, entry in state.items()}
    names = {*params, *(key.rpartition("/~/")[0] for key in state)}
    if len(names) != 1 or averages.keys() != AVERAGES.keys():
        raise ValueError(f"not a BatchNorm, but {', '.join(names)}: give its part of the trees")
    affine = {AFFINE[leaf]: v for entry in params.values() for leaf, v in entry.items()}
    stats = {ours: averages[name]["average"] for name, ours in AVERAGES.items()}
    arrays = {n: stored_array(v, n).reshape(-1) for n, v in (affine | stats).items()}
    fields = {ours: settings[name] for name, ours in FIELDS.items() if name in settings}
    if settings.get("data_format", "").startswith(("channels_first", "NC")):
        fields["axis"] = 1
    return batch_norm.fields_and_variables(
        batch_norm.settings("haiku", momentum=settings["decay_rate"]),
        arrays | {"count": averages["mean_ema"]["counter"]},
        **fields,
    )


def layer_to_haiku(
    layer: Any, variables: Any, *, ndim: int
) -> tuple[dict[str, Any], tuple[Tree, Tree]]:
    """(keyword arguments of `haiku.BatchNorm`, (params, state) of a model that it is).

    Arguments and errors as for `layer_to_torch`; ndim is the rank of the layer's inputs, which
    Haiku's arrays have too.
    """
    has = ("axis_name", "axis_index_groups")
    fields, arrays = batch_norm.carried(layer, variables, "haiku", has=has)
    if fields["axis"] not in (1, -1, ndim - 1):
        raise ValueError(f"haiku's features are at axis 1 or the last, not {fields['axis']}")
    shape = [1] * ndim
    shape[fields["axis"]] = -1
    given = {name: fields[ours] for name, ours in FIELDS.items() if fields[ours] is not None}
    settings = given | {
        "decay_rate": fields["momentum"],
        "create_scale": fields["use_scale"],
        "create_offset": fields["use_bias"],
        "data_format": "channels_first" if shape[-1] == 1 else "channels_last",
    }
    count = single_count(arrays["count"])
    # hidden = average (1 - decay^counter), as rounded there.
    left = 1 - jnp.power(jnp.asarray(fields["momentum"], arrays["mean"].dtype), count)
    state = {}
    for name, ours in AVERAGES.items():
        average = arrays[ours].reshape(shape)
        entry = {"average": average, "hidden": average * left, "counter": count}
        state[f"batch_norm/~/{name}"] = entry
    affine = {n: arrays[ours].reshape(shape) for n, ours in AFFINE.items() if ours in arrays}
    return settings, ({"batch_norm": affine} if affine else {}, state)
