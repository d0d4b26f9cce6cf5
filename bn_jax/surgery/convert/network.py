"""Layers of two models in pairs, and the arrays of one in the places of the other's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from bn_jax.surgery.convert import models
from bn_jax.surgery.convert.layers import Arrays, Codec, Layer, described
from bn_jax.surgery.convert.positions import Shapes, permuted, refuse_unsaid
from bn_jax.surgery.convert.windows import resolved


class Framework(NamedTuple):
    """What differs between frameworks.

    Attributes:
      read: model -> its layers that have parameters, in the order of definition.
      write: (model, arrays by the names of layers) -> what the framework loads.
      codecs: by kind of layer.
    """

    read: Callable[[Any], list[Layer]]
    write: Callable[[Any, dict[str, Arrays]], Any]
    codecs: dict[str, Codec]


def load(
    framework: Framework, foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any
) -> Any:
    """The variables with the foreign model's values: what every `from_...` does."""
    pairs, shapes = _pairs(framework, foreign, model, variables, *inputs, **options)
    new = {}
    for theirs, ours, kind in pairs:
        arrays = framework.codecs[kind].decode(theirs)
        arrays = permuted(arrays, kind, theirs.name, *shapes)
        encoded = models.CODECS[kind].encode(arrays, ours.settings)
        new[ours.name] = _fitted(encoded, ours.stored)
    return models.write(variables, new)


def dump(
    framework: Framework, foreign: Any, model: Any, variables: Any, *inputs: Any, **options: Any
) -> Any:
    """The foreign model with our values: what every `to_...` does."""
    pairs, shapes = _pairs(framework, foreign, model, variables, *inputs, **options)
    new = {}
    for theirs, ours, kind in pairs:
        arrays = models.CODECS[kind].decode(ours)
        arrays = permuted(arrays, kind, theirs.name, *shapes, back=True)
        encoded = framework.codecs[kind].encode(arrays, ours.settings | theirs.settings)
        new[theirs.name] = theirs.stored | _fitted(encoded, theirs.stored)
    return framework.write(foreign, new)


def _pairs(
    framework: Framework,
    foreign: Any,
    model: Any,
    variables: Any,
    *inputs: Any,
    names: Mapping[str, str] | None = None,
    flattened: Shapes | None = None,
    unflattened: Shapes | None = None,
    **call: Any,
) -> tuple[list[tuple[Layer, Layer, str]], tuple[Shapes, Shapes]]:
    """(theirs, ours, kind) in the order of first calls here; (flattened, unflattened)."""
    theirs = {layer.name: layer for layer in framework.read(foreign)}
    ours = {layer.name: layer for layer in models.read(model, variables, *inputs, **call)}
    names = _names(theirs, ours, names)
    pairs = [
        (theirs[there], ours[here], _checked(framework.codecs, theirs[there], ours[here]))
        for here, there in names.items()
    ]
    # At the end: a pair that does not fit says more than the number of layers.
    _refuse_left_over(theirs.keys() - names.values(), "the other framework's")
    _refuse_left_over(ours.keys() - names.keys(), "the Flax")
    shapes = flattened or {}, unflattened or {}
    refuse_unsaid(pairs, *shapes)
    return pairs, shapes


def _names(theirs, ours, names):
    """Of the layers of each pair: {ours: theirs}, in the order of ours."""
    if names is None:
        return dict(zip(ours, theirs, strict=False))
    if unknown := [*(names.keys() - theirs.keys()), *(set(names.values()) - ours.keys())]:
        raise ValueError(
            f"names has {', '.join(sorted(unknown))}: there are {', '.join(theirs)} in the "
            f"other framework's model and {', '.join(ours)} in the Flax model"
        )
    back = {here: there for there, here in names.items()}
    if len(back) < len(names):
        twice = [here for there, here in names.items() if back[here] != there]
        raise ValueError(f"names has two layers for {', '.join(twice)}: one has one's values")
    return {here: back[here] for here in ours if here in back}


def _refuse_left_over(names, where):
    if names:
        raise ValueError(
            f"left over in {where} model: {', '.join(sorted(names))}; the other has no layer "
            "for it"
        )


def _checked(codecs, theirs, ours):
    """The kind of both; a ValueError where they differ."""
    kind = ours.kinds[0]
    if kind not in theirs.kinds:
        raise ValueError(
            _misfit("are of other kinds", theirs, theirs.stored, ours, ours.stored)
        )
    if extra := theirs.stored.keys() - codecs[kind].names:
        raise ValueError(
            f"cannot convert {theirs.name}, a {kind} in Flax: it has {', '.join(sorted(extra))}"
        )
    a, b = codecs[kind].decode(theirs), models.CODECS[kind].decode(ours)
    shapes = [{n: v.shape for n, v in arrays.items() if n != "count"} for arrays in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(_misfit("differ, in Flax's layout", theirs, a, ours, b))
    _check_settings(theirs, ours, kind, b)
    if "count" in b and "count" not in a:
        raise ValueError(
            f"{theirs.name} has no number of updates, which the estimator of {ours.name} "
            "averages by: use estimator=ema"
        )
    return kind


def _check_settings(theirs, ours, kind, arrays):
    known = [_in_numbers(layer.settings, kind, arrays, ours.x) for layer in (theirs, ours)]
    for name in sorted(known[0].keys() & known[1].keys() - models.LAYOUT):
        a, b = (settings[name] for settings in known)
        numbers = isinstance(a, float) and isinstance(b, float)
        if not (math.isclose(a, b, rel_tol=1e-6) if numbers else a == b):
            raise ValueError(
                f"{theirs.name} has {name}={_spelled(a)} and {ours.name} has "
                f"{name}={_spelled(b)}: construct them alike"
            )


def _in_numbers(settings, kind, arrays, x):
    if "padding" not in settings:
        return settings
    size = arrays["kernel"].shape[:-2]
    return settings | {"padding": resolved(kind, settings, size, x[-1 - len(size) : -1])}


def _spelled(v):
    return getattr(v, "__name__", v)


def _misfit(what, theirs, a, ours, b):
    return (
        f"{described(theirs, a)} and {described(ours, b)} {what}: layers are taken in order; "
        "names={name there: name here} pairs them otherwise"
    )


def _fitted(arrays, like):
    """In the shapes and dtypes of the template, which has the same elements."""

    def fitted(v, old):
        v = v if v.size == old.size else jnp.broadcast_to(v, old.shape)
        return v.reshape(old.shape).astype(old.dtype)

    return {name: fitted(v, like[name]) for name, v in arrays.items() if name in like}
