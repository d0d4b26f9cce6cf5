"""A foreign model beside a Flax model, on the same inputs: what can be run is run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bn_jax.surgery.compare import noise

Run = Callable[[tuple[Any, ...]], Any]  # inputs -> outputs


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far an output is from the foreign model's."""

    largest: float  # of the absolute differences; infinite where an output is not finite
    scale: float  # the largest absolute value of the foreign output
    said: str

    @property
    def relative(self) -> float:
        """The difference in units of its output's largest value."""
        if not self.largest or np.isinf(self.largest):
            return self.largest
        return self.largest / self.scale if self.scale else np.inf


Differences = dict[str, Difference]  # by output


def differences(
    ours: Run,
    theirs: Run,
    inputs: tuple[Any, ...],
    *,
    channels_first: bool,
    foreign_inputs: Any,
    tolerance: float,
) -> Differences:
    """The differences of every output, on the inputs and on noise like them.

    There is no noise where `foreign_inputs` are arrays, as it would not be theirs.

    Args:
      inputs: in Flax's layout. If `channels_first`, the foreign model gets images with their
        channels first, and an input of three axes in the order that fits.
      foreign_inputs: what it gets instead, or a function from the inputs to that, or None.
      tolerance: relative; within it no other order is tried.

    Raises:
      ValueError: the foreign model cannot be run on these inputs.
    """

    def candidates(inputs):
        if callable(foreign_inputs):
            return [foreign_inputs(*inputs)]
        if foreign_inputs is not None:
            return [foreign_inputs]
        return _layouts(inputs) if channels_first else [inputs]

    found = _nearest(ours(inputs), theirs, candidates(inputs), tolerance)
    if foreign_inputs is None or callable(foreign_inputs):
        other = noise(inputs)
        for n, d in _nearest(ours(other), theirs, candidates(other), tolerance).items():
            # What is not finite on noise only says that the noise is no input.
            if np.isfinite(d.scale) and d.relative > found[n].relative:
                found[n] = d
    return found


def worst(found: Differences) -> float:
    """The largest relative difference."""
    return max((d.relative for d in found.values()), default=0.0)


def compared(ours: Any, theirs: Any) -> Differences:
    """The differences of outputs, whose images may have their channels first in `theirs`."""
    named = jax.tree_util.tree_flatten_with_path(ours)[0]
    leaves = jax.tree.leaves(plain(theirs))
    if len(leaves) != len(named):
        said = f"{len(named)} outputs, and {len(leaves)} of the other model's"
        return {"": Difference(np.inf, 1.0, said)}
    return {
        jax.tree_util.keystr(path): _difference(np.asarray(a, float), np.asarray(b, float))
        for (path, a), b in zip(named, leaves, strict=True)
    }


def plain(outputs: Any, array: Callable[[Any], Any] = lambda v: v) -> Any:
    """Outputs in dicts and lists, as JAX knows them, whatever classes of these they are in."""
    if isinstance(outputs, Mapping):
        return {key: plain(v, array) for key, v in outputs.items()}
    if isinstance(outputs, tuple | list):
        return [plain(v, array) for v in outputs]
    return outputs if outputs is None else array(outputs)


def _difference(a: np.ndarray, b: np.ndarray) -> Difference:
    turned = [b, np.moveaxis(b, 1, -1)] if b.ndim > 2 else [b]
    fitting = [v for v in turned if v.shape == a.shape]
    if not fitting:
        return Difference(np.inf, 1.0, f"of shape {a.shape}, and {b.shape} there")
    scale = float(np.max(np.abs(b), initial=0))
    if not (np.isfinite(a).all() and np.isfinite(scale)):
        return Difference(np.inf, scale, "not finite")
    largest = float(min(np.max(np.abs(a - v), initial=0) for v in fitting))
    return Difference(largest, scale, f"off by {largest:.2g} of {scale:.2g}")


def _layouts(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The inputs with the channels of images first; of three axes, in both orders."""

    def orders(v):
        v = np.asarray(v)
        return [v, np.moveaxis(v, -1, 1)][v.ndim > 3 :] if v.ndim > 2 else [v]

    leaves, structure = jax.tree.flatten(inputs)
    for chosen in itertools.product(*map(orders, leaves)):
        yield jax.tree.unflatten(structure, chosen)


def _nearest(
    ours: Any, theirs: Run, candidates: Iterable[Any], tolerance: float
) -> Differences:
    """The differences in the layout of inputs in which they are least."""
    errors, found = [], []
    for inputs in candidates:
        try:
            outputs = theirs(inputs)
        except Exception as error:  # a layout that is none of the model's, in any framework
            errors.append(error)
            continue
        found.append(compared(ours, outputs))
        if worst(found[-1]) <= tolerance:
            break
    if not found:
        first = [type(errors[0]).__name__, *str(errors[0]).split("\n")][:2]
        raise ValueError(
            f"the other model cannot be run on the sample ({': '.join(first)}): give "
            "foreign_inputs= or foreign_call=, or the expected= outputs"
        ) from errors[0]
    return min(found, key=worst)
