"""Layers of two models in pairs that fit."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping

from jax import lax

from bn_jax.surgery.convert.layers import Layer, Settings, listed
from bn_jax.surgery.convert.models import KINDS

Pair = tuple[Layer, Layer, str]  # theirs, ours, kind
Unlike = dict[str, list[str]]  # sentences by setting
# Settings that change what training does, and no output in evaluation.
IN_TRAINING = ("estimator", "layer", "momentum", "unbiased")
# A model may pad in an operation of its own: whether it does, its outputs show.
IN_OUTPUTS = ("padding", "padding_mode")


def known(layers: Collection[Layer], skip: Collection[str]) -> dict[str, Layer]:
    """The layers by name, without the arrays whose names match a pattern of `skip`.

    Raises:
      ValueError: an array that is left, and is of no layer that is converted.
    """
    found, unknown = {}, {}
    for layer in layers:
        stored = {}
        for n, v in layer.stored.items():
            above = layer.name
            names = [above, f"{above}/{n}", f"{above}.{n}"] if above else [n]
            if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in skip):
                continue
            stored[n] = v
            if not layer.codecs:
                of = f" of a {layer.cls.__name__}" if layer.cls else ""
                unknown[names[-1]] = f"{names[-1]}{of}"
        if stored:
            found[layer.name] = dataclasses.replace(layer, stored=stored)
    if unknown:
        raise ValueError(
            f"cannot convert {listed(unknown.values())}: not called, or no BatchNorm, "
            f"{', '.join(KINDS)}; skip={(next(iter(unknown)),)} leaves it out"
        )
    return found


def pairings(
    theirs: Collection[str], ours: Collection[str], names: Mapping[str, str] | None
) -> Iterator[dict[str, str]]:
    """{ours: theirs}, in the order of ours, as `names` says or in the ways that may be meant.

    Layers whose names agree but for case, punctuation and the modules that all are in first,
    and the others in order; then all of them in order.

    Raises:
      ValueError: names that are of no layer, or two for one.
    """
    if names is not None:
        wrong = {*(names.keys() - theirs), *(set(names.values()) - set(ours))}
        wrong |= {here for here, n in Counter(names.values()).items() if n > 1}
        if wrong:
            raise ValueError(
                f"names has {listed(sorted(wrong))}: pair each of {listed(theirs)}, in the "
                f"other framework's model, with one of {listed(ours)}, in the Flax model"
            )
        back = {here: there for there, here in names.items()}
        yield {here: back[here] for here in ours if here in back}
        return
    simple = [_simple(list(side)) for side in (theirs, ours)]
    agree = {ours: simple[0][short] for short, ours in simple[1].items() if short in simple[0]}
    left = (n for n in theirs if n not in agree.values())
    both = agree | dict(zip((n for n in ours if n not in agree), left, strict=False))
    by_name = {n: both[n] for n in ours if n in both}
    by_order = dict(zip(ours, theirs, strict=False))
    yield by_name
    if by_order != by_name:
        yield by_order


def _simple(names):
    """The names by what they are without the modules that all are in, case and punctuation."""
    parts = [re.split(r"\W", n) for n in names]
    above = zip(*(p[:-1] for p in parts), strict=False)
    common = len(list(itertools.takewhile(lambda each: len(set(each)) == 1, above)))
    short = [re.sub(r"[\W_]", "", "".join(p[common:])).lower() for p in parts]
    return {s: n for s, n in zip(short, names, strict=True) if short.count(s) == 1}


def paired(
    theirs: dict[str, Layer],
    ours: dict[str, Layer],
    names: dict[str, str],
    ignore: Collection[str],
) -> tuple[list[Pair], Unlike]:
    """The pairs, in the order of ours, and the settings in which they differ.

    Of these only the settings IN_TRAINING and IN_OUTPUTS, each with one sentence for all
    pairs that differ in the same two values.

    Raises:
      ValueError: a pair of different kinds, shapes or other settings, or a layer without one.
    """
    pairs, alike = [], defaultdict(list)
    for here, there in names.items():
        pairs.append((theirs[there], ours[here], _kind(theirs[there], ours[here])))
        for name, a, b in _unlike(*pairs[-1]):
            said = f"{there or 'the layer'} has {name}={a} and {here} has {name}={b}"
            if name not in (*IN_TRAINING, *IN_OUTPUTS, *ignore):
                raise ValueError(f"{said}: construct them alike")
            if name not in ignore:
                alike[name, a, b].append(said)
    # At the end: a pair that does not fit says more than the number of layers.
    for left, where in (
        (theirs.keys() - names.values(), "the other framework's"),
        (ours.keys() - names.keys(), "the Flax"),
    ):
        if left:
            over = f"left over in {where} model: {listed(sorted(left))}"
            raise ValueError(f"{over}; the other has no such layer")
    unlike = defaultdict(list)
    for (name, *_), (said, *more) in alike.items():
        unlike[name].append(f"{said} ({len(more)} more such pairs)" if more else said)
    return pairs, unlike


def _kind(theirs: Layer, ours: Layer) -> str:
    """The kind of both; a ValueError where they differ."""
    kind = ours.kind
    if kind not in theirs.codecs:
        raise _misfit("are of other kinds", theirs, theirs.stored, ours, ours.stored)
    a, b = theirs.decoded(kind), ours.decoded(kind)
    if extra := a.keys() - theirs.codecs[kind].keys():
        what = f"{theirs.name}, a {kind} in Flax"
        raise ValueError(f"cannot convert {what}: it has {listed(sorted(extra))}")
    shapes = [{n: v.shape for n, v in arrays.items() if n != "count"} for arrays in (a, b)]
    if shapes[0] != shapes[1]:
        raise _misfit("differ, in Flax's layout", theirs, a, ours, b)
    if "count" in b and "count" not in a:
        raise ValueError(
            f"{theirs.name} has no number of updates, which the estimator of {ours.name} "
            "averages by: use estimator=ema"
        )
    return kind


def _misfit(what, theirs, a, ours, b):
    return ValueError(
        f"{theirs.described(a)} and {ours.described(b)} {what}: layers whose names agree are "
        "paired, the others in order; names={name there: name here} pairs them otherwise"
    )


def _unlike(theirs: Layer, ours: Layer, kind: str) -> Iterator[tuple[str, str, str]]:
    """(setting, value, value) of the settings that are known of both and differ."""
    known = [vars(_in_numbers(layer.settings, kind, ours)) for layer in (theirs, ours)]
    for name, a in known[0].items():
        b = known[1][name]
        floats = isinstance(a, float) and isinstance(b, float)
        same = math.isclose(a, b, rel_tol=1e-6) if floats else a == b
        if not (same or a is None or b is None):
            yield name, str(getattr(a, "__name__", a)), str(getattr(b, "__name__", b))


def _in_numbers(settings: Settings, kind: str, ours: Layer) -> Settings:
    """The settings with their padding in numbers, for the window and inputs of ours.

    Flax's "SAME" with a stride of 2 pads an even image by (0, 1), and torch's padding=1 by
    (1, 1): the outputs have one shape and are shifted.
    """
    padding, strides, dilation = settings.padding, settings.strides, settings.kernel_dilation
    if padding is None or strides is None or dilation is None:
        return settings
    window = ours.decoded(kind)["kernel"].shape[:-2]
    size = [d * (k - 1) + 1 for k, d in zip(window, dilation, strict=True)]
    mode = settings.padding_mode or "ZEROS"
    if padding in ("CIRCULAR", "REFLECT"):  # as `flax.linen.Conv` has them
        padding, mode = tuple(((k - 1) // 2, k // 2) for k in size), padding
    elif padding == "CAUSAL":
        padding = tuple((k - 1, 0) for k in size)
    elif isinstance(padding, str) and kind == "ConvTranspose":
        padding = tuple(_transposed(*v, padding) for v in zip(size, strides, strict=True))
    elif isinstance(padding, str):
        x = ours.x[-1 - len(size) : -1]
        padding = tuple(lax.padtype_to_pads(x, size, strides, padding))
    return dataclasses.replace(settings, padding=padding, padding_mode=mode)


def _transposed(size, stride, padding):
    """As `jax.lax.conv_transpose` has it."""
    if padding == "VALID":
        return size - 1, max(size, stride) - 1
    low = min(size - 1, math.ceil((size + stride - 2) / 2))
    return low, size + stride - 2 - low
