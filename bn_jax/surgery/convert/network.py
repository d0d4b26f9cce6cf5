"""The arrays of one of two models in the places of the other's, and both beside each other."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bn_jax.surgery import intercept
from bn_jax.surgery.calls import BatchNorms
from bn_jax.surgery.convert import beside, models, positions
from bn_jax.surgery.convert.layers import Arrays, Layer, listed
from bn_jax.surgery.convert.pairs import IN_OUTPUTS, Pair, Unlike, known, paired, pairings
from bn_jax.surgery.convert.positions import Orders, Shapes

PACKAGES = ("torch", "keras", "flax", "bn_jax")
New = dict[str, Arrays]  # by the names of layers, as they are stored


@dataclasses.dataclass(frozen=True)
class Framework:
    """What differs between frameworks.

    `read` returns the layers of a model in the order of definition. `write` returns what the
    framework loads, where arrays that are not given stay the model's. `runner`, of a model and
    what was written or None, is what it computes in evaluation; None if it cannot be run.
    """

    read: Callable[[Any], list[Layer]]
    write: Callable[[Any, New], Any]
    runner: Callable[[Any, Any], Callable[..., Any] | None]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `from_torch`."""

    names: Mapping[str, str] | None = None
    flattened: Shapes = dataclasses.field(default_factory=dict)
    unflattened: Shapes = dataclasses.field(default_factory=dict)
    batch_norms: BatchNorms | None = None
    skip: Collection[str] = ()
    ignore: Collection[str] = ()
    expected: Any = None
    foreign_inputs: Any = None
    foreign_call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Of public networks, up to 50 layers of float32, rounding leaves at most 2e-6; an
    # approximate gelu in place of torch's leaves 4e-5.
    tolerance: float = 1e-5
    unchecked: bool = False
    with_differences: bool = False


def split(options: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """The options, and what remains: the keyword arguments of the Flax model."""
    names = {field.name for field in dataclasses.fields(Options)}
    own = {k: v for k, v in options.items() if k in names}
    return Options(**own), {k: v for k, v in options.items() if k not in own}


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """One way to pair the layers and to order their features; what is written so."""

    pairs: list[Pair]
    unlike: Unlike
    orders: dict[str, Orders]
    new: New
    written: Any
    found: beside.Differences


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A conversion from the foreign model, or, if `back`, to it."""

    framework: Framework
    foreign: Any
    model: intercept.Model
    variables: Any
    inputs: tuple[Any, ...]
    all_options: Mapping[str, Any]  # with the keyword arguments of the Flax model
    back: bool = False

    def result(self) -> Any:
        """What `from_...` and `to_...` return: of the first attempt that fits."""
        self._check()
        attempts, refused = [], []
        for tried in self._attempts(refused):
            fit = [a for a in tried if beside.worst(a.found) <= self.options.tolerance]
            if fit:
                return self._returned(*fit)
            attempts += tried
        if attempts:
            raise self._differs(min(attempts, key=lambda a: beside.worst(a.found)))
        raise refused[0]

    @functools.cached_property
    def options(self) -> Options:
        """Those that are ours."""
        return split(self.all_options)[0]

    @functools.cached_property
    def _run(self):
        return models.run(self.model, split(self.all_options)[1])

    def _check(self):
        expected, back = self.options.expected, self.back
        if expected is not None and back:
            raise ValueError("expected= is for from_...: in to_... the other has no values")
        shapes = any(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(self.inputs))
        alone = expected is None and self.framework.runner(self.foreign, None) is None
        if (shapes or alone) and not self.options.unchecked:
            what = "inputs that are shapes alone" if shapes else "arrays without their model"
            raise ValueError(
                f"{what} cannot be run, and nothing else shows a setting or an order that is "
                f"another: give {'arrays' if shapes else 'the model, or its expected= outputs'}"
                ", or unchecked=True"
            )

    def _attempts(self, refused: list[ValueError]) -> Iterator[list[_Attempt]]:
        """Those of each pairing that fits; why others do not is added to `refused`."""
        options, call = split(self.all_options)
        norms = intercept.known(options.batch_norms)
        reading = self.model, self.variables, self.inputs, call, norms
        theirs = known(self.framework.read(self.foreign), options.skip)
        ours = known(models.read(*reading), options.skip)
        first = any(layer.channels_first for layer in theirs.values())
        orders = positions.derived([*ours.values()], *reading) if first else {}
        for names in pairings(theirs, ours, options.names):
            try:
                pairs, unlike = paired(theirs, ours, names, options.ignore)
            except ValueError as error:
                refused.append(error)
                continue
            ways = self._said_or(orders, pairs, unlike)
            yield [self._attempt(pairs, unlike, each, first) for each in ways]

    def _said_or(self, orders, pairs, unlike) -> list[dict[str, Orders]]:
        """Orders with those that the caller gives in their place; then these alone."""
        shapes = self.options.flattened, self.options.unflattened
        names = {theirs.name: ours.name for theirs, ours, _ in pairs}
        given = {*shapes[0], *shapes[1]}
        if unknown := given - names.keys():
            raise ValueError(
                f"a shape is given for {listed(sorted(unknown))}, of which there is none: "
                f"there are {listed(names)}"
            )
        said = {
            names[n]: Orders(*(positions.order_of(by_name.get(n)) for by_name in shapes))
            for n in given
        }
        unsaid = [(n, here) for n, here in names.items() if here in orders.keys() - said.keys()]
        if self.options.unchecked:
            for there, here in unsaid:
                argument = "flattened" if orders[here].after is None else "unflattened"
                raise ValueError(
                    f"{there}: its features are an image's, [C, H, W] there and [H, W, C] "
                    f"here: give {argument}={{{there!r}: (C, H, W)}}, or None for the shape if "
                    "their order is the same in both"
                )
            for name in unlike.keys() & set(IN_OUTPUTS):
                raise ValueError(f"{unlike[name][0]}: construct them alike")
        return [orders | said, said] if unsaid else [said]

    def _attempt(self, pairs, unlike, orders, first) -> _Attempt:
        new = {}
        for theirs, ours, kind in pairs:
            source, into = (ours, theirs) if self.back else (theirs, ours)
            order, arrays = orders.get(ours.name, Orders()), source.decoded(kind)
            arrays = positions.permuted(arrays, kind, theirs.name, order, self.back)
            new[into.name] = into.encoded(kind, arrays)
        if self.back:
            written = self.framework.write(self.foreign, new)
        else:
            written = models.write(self.variables, new)
        found = {} if self.options.unchecked else self._differences(written, first)
        return _Attempt(pairs, unlike, orders, new, written, found)

    def _differences(self, written, first) -> beside.Differences:
        options = self.options
        variables, result = (self.variables, written) if self.back else (written, None)
        ours = functools.partial(self._run, variables)
        with jax.default_matmul_precision("highest"):
            theirs = self.framework.runner(self.foreign, result)
            if theirs is None or options.expected is not None:
                return beside.compared(ours(self.inputs), options.expected)
            return beside.differences(
                ours,
                lambda inputs: theirs(*inputs, **options.foreign_call),
                self.inputs,
                channels_first=first,
                foreign_inputs=options.foreign_inputs,
                tolerance=options.tolerance,
            )

    def _returned(self, fit: _Attempt, other: _Attempt | None = None) -> Any:
        if other and not jax.tree.all(jax.tree.map(np.array_equal, fit.new, other.new)):
            raise ValueError(
                f"the outputs do not show the order of the features of {listed(fit.orders)}: "
                "give a sample that does, or flattened=, or foreign_inputs= where its layout "
                "is not certain"
            )
        in_training = {n: said for n, said in fit.unlike.items() if n not in IN_OUTPUTS}
        if in_training:
            said = "; ".join(s for each in in_training.values() for s in each)
            warnings.warn(
                f"{said}: in training the two differ; ignore={tuple(in_training)} says so",
                stacklevel=4,
            )
        found = {f"output{name}": d.largest for name, d in fit.found.items()}
        return (fit.written, found) if self.options.with_differences else fit.written

    def _differs(self, attempt: _Attempt) -> ValueError:
        skip, tolerance = self.options.skip, self.options.tolerance
        found = ((n, d) for n, d in attempt.found.items() if d.relative > tolerance)
        said = [f"output{name} is {d.said}" for name, d in found]
        taken = defaultdict(list)
        for theirs, _, kind in attempt.pairs:
            if theirs.cls and theirs.cls.__module__.partition(".")[0] not in PACKAGES:
                taken[f"{theirs.cls.__name__} taken for a {kind}"].append(theirs.name)
        causes = [s for n in IN_OUTPUTS for s in attempt.unlike.get(n, ())]
        causes += [f"{what} ({listed(names)})" for what, names in taken.items()]
        causes += [f"what skip={skip} leaves out"] if skip else []
        causes += [
            "a usual cause is training mode (train=False), an operation or a setting that only "
            "one of them has, half precision (tolerance=), equal layers in another order "
            "(names=), or features (flattened=) or an input (foreign_inputs=) in another order"
        ]
        return ValueError(
            f"the two models differ: {'; '.join(said)} (tolerance {tolerance:g}): "
            f"{'; '.join(causes)}"
        )
