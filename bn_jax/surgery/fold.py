"""A BatchNorm at inference is an affine map: it goes into the linear layer next to it.

With a = scale / sqrt(var + epsilon) and c = bias - a mean per feature, y = a x + c. Before
it stands a layer with kernel W and bias b, whose outputs it scales (Jacob et al. 2018,
section 3.2):

    W' = a W (over the output features)        b' = a b + c

or after it, whose inputs it scales:

    W' = W a (over the input features)         b' = b + W c
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax.surgery import compare, kernels
from bn_jax.surgery.calls import BatchNorms, Call, Path, attributes, left_alone, spelled
from bn_jax.surgery.flow import Flow, trace
from bn_jax.surgery.freeze import Pattern, matching, norm_paths
from bn_jax.surgery.intercept import (
    Model,
    Run,
    Variables,
    evaluation,
    intercept,
    known,
    swapped,
)
from bn_jax.surgery.tree import Leaves, layer_leaves, replace_leaves

# Of `tolerance`, what a model that computes in float64 throughout may differ by.
_EXACT = 1e-3


class Pair(NamedTuple):
    """A BatchNorm and the linear layer that has absorbed it, which was before or after it."""

    norm: Path
    layer: Path
    side: str


class Folded(NamedTuple):
    """What `fold` returns.

    Attributes:
      model: as the one given, without the BatchNorms that are folded.
      variables: for that model.
      pairs: what was folded into what, in the order of the calls.
      refused: of every other BatchNorm the reason.
      difference: the largest difference of the two models' outputs, on the sample and on
        noise like it, in terms of the largest absolute value of the same feature.
    """

    model: Model
    variables: Variables
    pairs: list[Pair]
    refused: dict[Path, str]
    difference: float


def fold(
    model: Model,
    variables: Variables,
    *inputs: Any,
    tolerance: float = 1e-3,
    exclude: Pattern = (),
    batch_norms: BatchNorms | None = None,
    **call: Any,
) -> Folded:
    """Absorbs every BatchNorm that can be into the linear layer before it, or after it.

    Which layers are next to each other is read off what the model does with the sample.
    Linear layers are Flax's Dense, DenseGeneral, Conv (grouped and depthwise too) and
    ConvTranspose, in NNX Linear, LinearGeneral, Conv and ConvTranspose. A layer that had no
    bias gets one. An activation within a BatchNorm of ours stays.

        folded = fold(model, variables, images, train=False)
        logits = folded.model.apply(folded.variables, images, train=False)

    The two models are compared on the sample and on noise like it. Where the model can
    compute in float64, it does so too, and each number that it returns is compared by its
    own scale, to a thousandth of `tolerance`, or to what rounding makes of the network if
    that is more. A BatchNorm that changes more is refused.

    Args:
      model, variables: see `bn_jax.surgery`.
      *inputs: a sample: what the model is called with at inference.
      tolerance: the largest `difference` to put up with. In bfloat16 outputs differ by 1e-2.
      exclude: BatchNorms that stay, by a pattern as `freeze` takes it.
      batch_norms: further classes of BatchNorms; see `Adapter`.
      **call: what puts the model into inference mode, `train=False` for instance.

    Raises:
      ValueError: values of the sample are not finite, or what the model returns is NaN.
    """
    if bad := compare.nonfinite(inputs):
        raise ValueError(f"{bad} values of the sample are not finite: fold by one that is")
    plain = _Trial.of(model, variables, inputs, call, known(batch_norms), tolerance)
    plain.check()
    excluded = matching(variables, exclude, model)
    found = {
        path: "it is excluded" if path in excluded else plain.pair(path)
        for path in plain.flow.before
    }
    trials = [plain] if plain.flow.exact else [*_in_float64(plain, tolerance), plain]
    differences = functools.cache(lambda pairs: [t.difference(pairs) for t in trials])

    def wrong(pairs):
        """Why these pairs do not leave the model as it is, if so; of the last of them."""
        for trial, difference in zip(trials, differences(pairs), strict=True):
            if not difference <= trial.tolerance:
                return trial.reason(pairs[-1], difference, alone=len(trials) == 1)
        return None

    wanted = tuple(pair for pair in found.values() if isinstance(pair, Pair))
    pairs, refused = _without_fault((), wanted, wrong)
    refused |= {path: why for path, why in found.items() if isinstance(why, str)}
    for path, norm in swapped(model, variables, norm_paths(variables, model)).items():
        if path not in found:
            refused[path] = f"it is no BatchNorm any more: {norm} is in its place"
    for path, c in plain.flow.strangers.items():
        refused[path] = f"its class is not known: {c.__module__}.{c.__name__}; see batch_norms"
    return Folded(*plain.without(pairs), list(pairs), refused, differences(pairs)[-1])


def _without_fault(kept, new, wrong):
    """The kept pairs with those of the new ones that can join them, and why others cannot.

    By halves, as there is seldom more than one at fault.
    """
    reason = wrong((*kept, *new)) if new else None
    if reason is None:
        return (*kept, *new), {}
    if len(new) == 1:
        return kept, {new[0].norm: reason}
    middle = len(new) // 2
    kept, refused = _without_fault(kept, new[:middle], wrong)
    kept, others = _without_fault(kept, new[middle:], wrong)
    return kept, refused | others


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A model in one precision, and what it returns for the sample and for noise like it.

    Attributes:
      model, variables, call, norms: what is given.
      samples: what the model is called with.
      run, flow: how it is called, and which layer feeds which.
      leaves: the variables of each layer; those of BatchNorms by our names.
      outputs: for each sample.
      perturbed: with numbers changed as if by rounding, where all is computed in float64.
      tolerance: the largest difference to put up with.
      precision: the context to compute in.
    """

    model: Model
    variables: Variables
    call: dict[str, Any]
    norms: BatchNorms
    samples: tuple[tuple[Any, ...], ...]
    run: Run
    flow: Flow
    leaves: dict[Path, Leaves]
    outputs: list[Any]
    perturbed: list[Any] | None
    tolerance: float
    precision: Callable[[], Any]

    @classmethod
    def of(
        cls, model, variables, inputs, call, norms, tolerance,
        precision: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> _Trial:  # fmt: skip
        """Traces the model, and runs it."""
        run = evaluation(model, variables, *inputs, **call)
        flow = trace(model, variables, *inputs, norms=norms, run=run, **call)
        leaves = {path: {} for path in flow.calls} | layer_leaves(model, variables)
        leaves |= {p: flow.calls[p].adapted.ours(leaves[p]) for p in flow.before}
        samples, perturbed = (inputs, compare.noise(inputs)), None
        outputs = [run(model, variables, *v, **call)[0] for v in samples]
        if flow.exact:
            tolerance *= _EXACT
            moved, others = compare.perturb((variables, samples))
            perturbed = [run(model, moved, *v, **call)[0] for v in others]
        return cls(
            model, variables, call, norms, samples, run, flow, leaves, outputs, perturbed,
            tolerance, precision,
        )  # fmt: skip

    def check(self) -> None:
        """Raises a ValueError if there is no output to compare."""
        if not compare.comparable(self.outputs[0]):
            calls, leaves = self.flow.calls, self.leaves
            why = ((p, kernels.not_affine(calls[p], leaves[p])) for p in self.flow.before)
            named = "".join(f"; {spelled(path)}: {reason}" for path, reason in why if reason)
            raise ValueError(
                f"what the model returns for the sample is NaN, infinite or empty{named}"
            )

    def pair(self, norm: Path) -> Pair | str:
        """With which layer the BatchNorm goes, or why with none."""
        flow, call = self.flow, self.flow.calls[norm]
        if why := kernels.not_affine(call, self.leaves[norm]):
            return why
        if norm in flow.held:
            return f"it {flow.held[norm]}"
        reasons = []
        for side, found in (("before", flow.before[norm]), ("after", flow.after[norm])):
            if isinstance(found, str):
                reasons.append(found)
                continue
            reason = kernels.refusal(flow.calls[found], call, side, self.leaves[found])
            reason = reason or flow.held.get(found)
            if reason is None:
                return Pair(norm, found, side)
            reasons.append(f"{spelled(found)} {reason}")
        return "; ".join(dict.fromkeys(reasons))

    def without(self, pairs: tuple[Pair, ...]) -> tuple[Model, Variables]:
        """The model and the variables without the BatchNorms of the pairs."""
        calls, new = self.flow.calls, {pair.layer: self.leaves[pair.layer] for pair in pairs}
        for norm, layer, side in pairs:
            a, c = kernels.factors(calls[norm], self.leaves[norm])
            new[layer] = kernels.absorb(calls[layer], new[layer], a, c, side)
        dtypes = {pair.norm: self.flow.outputs[pair.norm].dtype for pair in pairs}
        hook = _Folding(frozenset(dtypes.items()), frozenset(new))
        hooks = hook, self.norms, kernels.LINEAR, left_alone
        changed = intercept(self.model, self.variables, *hooks)
        return replace_leaves(changed, self.variables, new, dtypes)

    def difference(self, pairs: tuple[Pair, ...]) -> float:
        """The outputs', with the pairs folded."""
        if not pairs:
            return 0.0
        with self.precision():
            model, variables = self.without(pairs)
            new = [self.run(model, variables, *v, **self.call)[0] for v in self.samples]
        given = {"tolerance": self.tolerance, "elementwise": self.flow.exact}
        return compare.difference(self.outputs, new, self.perturbed, **given)

    def reason(self, pair: Pair, difference: float, alone: bool) -> str:
        """Why the pair is refused."""
        layer = self.flow.calls[pair.layer].layer
        why = f"does this {type(layer).__name__} compute with its kernel and bias alone?"
        why = why if self.flow.exact or alone else "these are rounding errors"
        return (
            f"in {spelled(pair.layer)} it changes the outputs by {difference:.2g} of their "
            f"size, more than {self.tolerance:g}: {why}"
        )


def _in_float64(plain: _Trial, tolerance: float) -> list[_Trial]:
    """The trial in float64, if the model computes in that throughout when it is told to."""
    precision, norms = functools.partial(jax.enable_x64, True), plain.norms
    given, everything = (plain.variables, plain.samples[0], plain.call), (nn.Module, nnx.Module)
    try:
        with precision():
            variables, inputs, call = compare.widen(given)
            hooks = _telling_float64, norms, everything, left_alone, True
            told = intercept(plain.model, variables, *hooks)
            wide = _Trial.of(told, variables, inputs, call, norms, tolerance, precision)
    except Exception:
        # There are models that insist on a dtype: in a scan's carry, in an assertion.
        return []
    return [wide] if wide.flow.exact else []


def _telling_float64(call: Call) -> Any:
    """The call of a module whose floating-point `dtype`, if it has one, is float64."""
    dtype = getattr(call.layer, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return call.proceed()
    with attributes(call.layer, dtype=jnp.float64):
        return call.proceed()


@dataclasses.dataclass(frozen=True)
class _Folding:
    """What is made of the calls of layers: a hook.

    Attributes:
      dtypes: of what each BatchNorm that is gone returned, with its path.
      changed: the layers that have absorbed them.
    """

    dtypes: frozenset[tuple[Path, jnp.dtype]]
    changed: frozenset[Path]

    def __call__(self, call: Call) -> Any:
        """The input of a BatchNorm, as it is but for its activation."""
        dtypes = dict(self.dtypes)
        if call.path in dtypes:
            activation = getattr(call.layer, "activation", None) or (lambda x: x)
            return activation(call.x).astype(dtypes[call.path])
        bias = {"use_bias": True} if call.path in self.changed else {}
        with attributes(call.layer, **bias):
            return call.proceed()
