"""Haiku: (params, state), as `transform_with_state` returns them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bn_jax.core.presets import PRESETS
from bn_jax.surgery.convert import batch_norm
from bn_jax.surgery.convert.layers import (
    Arrays,
    Codec,
    Layer,
    Leaf,
    codec,
    single_count,
    stored_array,
    vector,
)
from bn_jax.surgery.convert.network import Framework, dump, load

AVERAGES = {"mean_ema": "mean", "var_ema": "var"}
FIELDS = {
    "eps": "epsilon",
    "cross_replica_axis": "axis_name",
    "cross_replica_axis_index_groups": "axis_index_groups",
}


def from_haiku(foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any) -> Any:
    """The variables with the parameters and statistics of a Haiku model.

    Arguments and errors as for `from_torch`, but for

    Args:
      foreign: (params, state). In the order in which `init` made them: JAX sorts the names
        of a dict in all that it returns, and of sorted ones the order is not known. Then
        give `names`, or `{name: params[name] for name in init(key, x)[0]}`.

    The settings of its layers are not in them: decay rates and epsilons are not compared.
    """
    return load(HAIKU, foreign, model, variables, *inputs, **_ordered(foreign, options))


def to_haiku(
    foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any
) -> tuple[Any, Any]:
    """(params, state) like `foreign`, with the model's values. Arguments as `from_haiku`."""
    return dump(HAIKU, foreign, model, variables, *inputs, **_ordered(foreign, options))


def layer_from_haiku(
    layer: tuple[Mapping[str, Any], Mapping[str, Any]], **settings: Any
) -> tuple[dict[str, Any], dict[str, Arrays]]:
    """The fields of our BatchNorm and its variables, from a `haiku.BatchNorm`.

    Its averages are ours, its counter the count of every feature. Use as `layer_from_torch`.

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
    fields = {ours: settings[name] for name, ours in FIELDS.items() if name in settings}
    if settings.get("data_format", "").startswith(("channels_first", "NC")):
        fields["axis"] = 1
    fields = batch_norm.settings("haiku", momentum=settings["decay_rate"]) | fields
    return batch_norm.fields_and_variables(_read(layer), CODECS, **fields)


def layer_to_haiku(
    layer: Any, variables: Any, *, ndim: int
) -> tuple[dict[str, Any], tuple[dict[str, Any], dict[str, Any]]]:
    """(keyword arguments of `haiku.BatchNorm`, (params, state) of a model that it is).

    Args:
      layer, variables: as in `layer_to_torch`.
      ndim: rank of the layer's inputs, which Haiku's arrays have too.

    Raises:
      TypeError: no BatchNorm of bn_jax.
      ValueError: something that Haiku's layer does not have, with what to do.
    """
    fields, arrays = batch_norm.carried(
        layer, variables, "haiku", has=("axis_name", "axis_index_groups")
    )
    shape = [1] * ndim
    shape[fields["axis"]] = -1
    if fields["axis"] not in (1, -1, ndim - 1):
        raise ValueError(f"haiku's features are at axis 1 or the last, not {fields['axis']}")
    given = {name: fields[ours] for name, ours in FIELDS.items() if fields[ours] is not None}
    settings = given | {
        "decay_rate": fields["momentum"],
        "create_scale": fields["use_scale"],
        "create_offset": fields["use_bias"],
        "data_format": "channels_first" if shape[-1] == 1 else "channels_last",
    }
    stored = CODECS["BatchNorm"].encode(arrays, fields)
    stored = {name: v.reshape(shape) if v.ndim else v for name, v in stored.items()}
    return settings, _write(({}, {}), {"batch_norm": stored})


def _ordered(foreign, options):
    """The options; a ValueError where the order of the layers is not known."""
    names = [layer.name for layer in _read(foreign)]
    known = list(foreign[0]) == names and names != sorted(names)
    if len(names) > 1 and options.get("names") is None and not known:
        raise ValueError(
            f"the order of {', '.join(names)} is not known: JAX sorts names, and a BatchNorm "
            "without parameters has no place among the others: give names={name there: path "
            "here}, or the params in the order of init's"
        )
    return options


def _read(foreign: Any) -> list[Layer]:
    params, state = foreign
    stored = {
        name: {leaf: stored_array(v, f"{name}/{leaf}") for leaf, v in entry.items()}
        for name, entry in params.items()
    }
    norms = set()
    for key, entry in state.items():
        name, _, average = key.rpartition("/~/")
        if average not in AVERAGES:
            raise ValueError(f"cannot convert the state of {key}: it is of no BatchNorm")
        norms.add(name)
        stored.setdefault(name, {}).update(
            {f"{average}/{leaf}": stored_array(v, f"{key}/{leaf}") for leaf, v in entry.items()}
        )
    return [
        Layer(name, ("BatchNorm",), arrays, _NORM) if name in norms
        else Layer(name, _kinds(name, arrays), arrays)
        for name, arrays in stored.items()
    ]  # fmt: skip


def _kinds(name, arrays):
    if arrays.keys() <= {"scale", "offset"}:
        return ("LayerNorm", "GroupNorm")
    if arrays.keys() == {"embeddings"}:
        return ("Embed",)
    if "w" in arrays:
        return ("Dense",) if arrays["w"].ndim == 2 else ("Conv", "ConvTranspose")
    raise ValueError(f"cannot convert {name}: a layer of {', '.join(arrays)} is not known")


def _write(foreign: Any, new: dict[str, Arrays]) -> tuple[Any, Any]:
    params, state = ({key: dict(entry) for key, entry in part.items()} for part in foreign)
    for name, arrays in new.items():
        for leaf, v in arrays.items():
            average, _, value = leaf.rpartition("/")
            part, key = (state, f"{name}/~/{average}") if average else (params, name)
            part.setdefault(key, {})[value] = v
    return params, state


def _decode_norm(layer):
    stats = {
        ours: layer.stored[f"{name}/average"].reshape(-1) for name, ours in AVERAGES.items()
    }
    return _AFFINE.decode(layer) | stats | {"count": layer.stored["mean_ema/counter"]}


def _encode_norm(arrays, settings):
    """hidden = average (1 - decay^counter), as rounded there."""
    count = single_count(arrays["count"])
    left = 1 - jnp.power(jnp.asarray(settings["momentum"], arrays["mean"].dtype), count)
    stored = _AFFINE.encode(arrays, settings)
    for name, ours in AVERAGES.items():
        stored |= {
            f"{name}/average": arrays[ours],
            f"{name}/hidden": arrays[ours] * left,
            f"{name}/counter": count,
        }
    return stored


def _swapped(v):
    return jnp.swapaxes(v, -2, -1)


# Decay and epsilon are not among the arrays.
_NORM = {"layer": "BatchNorm"} | {n: PRESETS["haiku"][n] for n in ("estimator", "unbiased")}
_AFFINE = codec(scale=vector("scale"), bias=vector("offset"))
_AVERAGES = {f"{name}/{leaf}" for name in AVERAGES for leaf in ("average", "hidden", "counter")}
CODECS = {
    "Dense": codec(kernel=Leaf("w"), bias=Leaf("b")),
    "Conv": codec(kernel=Leaf("w"), bias=vector("b")),
    # A correlation, as Flax's is, that is stored as [*window, out, in].
    "ConvTranspose": codec(kernel=Leaf("w", _swapped, _swapped), bias=vector("b")),
    "Embed": codec(embedding=Leaf("embeddings")),
    "LayerNorm": _AFFINE,
    "GroupNorm": _AFFINE,
    "BatchNorm": Codec(_AFFINE.names | _AVERAGES, _decode_norm, _encode_norm),
}
HAIKU = Framework(_read, _write, CODECS)
