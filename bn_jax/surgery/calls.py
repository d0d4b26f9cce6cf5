"""One call of a layer, and how a class of BatchNorms is read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

import bn_jax.linen
import bn_jax.nnx

Path = tuple[Any, ...]  # of names, and of the numbers of lists
# A value, the name of the layer's attribute that has it, or a function of the layer.
Setting = Any
OURS = (bn_jax.linen.BatchNorm, bn_jax.nnx.BatchNorm)
GHOSTS = (bn_jax.linen.GhostBatchNorm, bn_jax.nnx.GhostBatchNorm)
RENORMS = (bn_jax.linen.BatchRenorm, bn_jax.nnx.BatchRenorm)
BATCH_NORMS = (nn.BatchNorm, nnx.BatchNorm, *OURS)  # of which the others are subclasses
# Of `swap`: in place of a BatchNorm these are BatchNorms to other operations too.
SWAPPED_BATCH_NORMS = ("bn", "flax", "ghost", "renorm")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How to read a BatchNorm of another class: its mode, settings and variables.

    Operations of `bn_jax.surgery` take adapters by class. The defaults are Flax's names, so a
    copy of its class needs no more than the first line:

        recalibrate(model, variables, batches, batch_norms={OwnNorm: Adapter()}, train=True)
        Adapter(mode="train", training=True, axis=-1, epsilon=1e-5, momentum=0.9)
        Adapter(momentum=lambda layer: 1 - layer.momentum, mean="running_mean")

    A class in `batch_norms` stands for its subclasses too. `None` in place of an Adapter says
    that a class with `batch_stats` (NNX: BatchStat) is no BatchNorm: it is left alone.

    Attributes:
      mode: the argument of the layer's call, or the layer's attribute, that says whether it
        trains. The call has precedence, unless what it says is None.
      training: what `mode` is in training, True or False; at inference it is the opposite.
      axis, epsilon, momentum: each the name of an attribute of the layer, a value, or a
        function of the layer. `momentum` is the weight of the old value; only `accumulate`
        asks for it.
      mean, var: names of the running statistics; `var` is the variance.
      scale, bias: names of the parameters; a layer may lack them.
    """

    mode: str = "use_running_average"
    training: bool = False
    axis: Setting | int | Sequence[int] = "axis"
    epsilon: Setting | float = "epsilon"
    momentum: Setting | float = "momentum"
    mean: str = "mean"
    var: str = "var"
    scale: str = "scale"
    bias: str = "bias"

    def read(self, layer: Any, setting: str) -> Any:
        """A setting of a layer: "axis", "epsilon" or "momentum".

        Raises:
          ValueError: the layer has no such attribute.
        """
        said = getattr(self, setting)
        if callable(said):
            return said(layer)
        if isinstance(said, str) and not hasattr(layer, said):
            raise ValueError(
                f"{type(layer).__name__} has no attribute {said!r}: say Adapter({setting}=...)"
            )
        return getattr(layer, said) if isinstance(said, str) else said

    def ours(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The layer's variables under the names mean, var, scale and bias."""
        names = {getattr(self, name): name for name in _NAMES}
        return {names.get(name, name): v for name, v in leaves.items()}

    def theirs(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `ours`."""
        names = {name: getattr(self, name) for name in _NAMES}
        return {names.get(name, name): v for name, v in leaves.items()}


_NAMES = ("mean", "var", "scale", "bias")
BatchNorms = Mapping[type, Adapter | None]
KNOWN: BatchNorms = dict.fromkeys(BATCH_NORMS, Adapter()) | {
    nn.SpectralNorm: None,
    nnx.SpectralNorm: None,
}


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
      path: of the layer, in the variables.
      layer: the module.
      args, kwargs: what it is called with.
      next: what it would have called.
      kind: the known class whose `__call__` it is, of which the layer's may be a subclass.
      adapter: how to read it, if it is a BatchNorm; otherwise None.
      swapped: the name of the norm in its place, if `swap` has put one there.
    """

    path: Path
    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    next: Callable[..., Any]
    kind: type
    adapter: Adapter | None
    swapped: str = ""

    @property
    def adapted(self) -> Adapter:
        """How to read a BatchNorm."""
        if self.adapter is None:
            raise TypeError(f"{spelled(self.path)}, a {self.kind.__name__}, is no BatchNorm")
        return self.adapter

    @property
    def x(self) -> jax.Array:
        """The input."""
        return self.args[0] if self.args else self.kwargs[next(iter(_parameters(self.kind)))]

    @property
    def use_running_average(self) -> bool | None:
        """Of a BatchNorm: what the call says or, where it does not, the layer."""
        mode = self.adapted.mode
        if mode not in _parameters(self.kind) and mode not in vars(self.layer):
            raise ValueError(
                f"{self.kind.__name__} has no argument and no attribute {mode!r}: say "
                "Adapter(mode=...)"
            )
        said = self._said(mode)
        if said is None:
            said = vars(self.layer).get(mode)
        return None if said is None else bool(said) != self.adapted.training

    @property
    def axis(self) -> int | Sequence[int]:
        """Of a BatchNorm: its feature axis, or axes."""
        return self.adapted.read(self.layer, "axis")

    @property
    def epsilon(self) -> float:
        """Of a BatchNorm: what it adds to the variance."""
        return self.adapted.read(self.layer, "epsilon")

    @property
    def momentum(self) -> Any:
        """Of a BatchNorm: the weight of the old value in its running statistics."""
        return self.adapted.read(self.layer, "momentum")

    def replace_x(self, x: jax.Array) -> Call:
        """The call with another input."""
        if self.args:
            return self._replace(args=(x, *self.args[1:]))
        return self._replace(kwargs={**self.kwargs, next(iter(_parameters(self.kind))): x})

    def proceed(self, use_running_average: bool | None = None) -> Any:
        """What the layer returns, a BatchNorm in the given mode if one is given."""
        if use_running_average is None:
            return self.next(*self.args, **self.kwargs)
        mode, parameters = self.adapted.mode, _parameters(self.kind)
        said = self.adapted.training != use_running_average
        names = list(parameters)
        at = names.index(mode) if mode in parameters else len(names)
        kwargs = dict(zip(names[at:], self.args[at:], strict=False)) | self.kwargs
        kwargs.pop(mode, None)
        # Flax's takes it from the constructor or from the call, and not from both.
        of_layer = mode in vars(self.layer)
        if of_layer and (mode not in parameters or parameters[mode].default is None):
            with attributes(self.layer, **{mode: said}):
                return self.next(*self.args[:at], **kwargs)
        return self.next(*self.args[:at], **kwargs, **{mode: said})

    def _said(self, name):
        """An argument of the call, or its default."""
        parameters = _parameters(self.kind)
        given = dict(zip(parameters, self.args, strict=False)) | self.kwargs
        if name in given or name not in parameters:
            return given.get(name)
        default = parameters[name].default
        return None if default is inspect.Parameter.empty else default


@functools.cache
def _parameters(kind):
    """Those of a call of the class, but `self`."""
    return dict(list(inspect.signature(kind.__call__).parameters.items())[1:])


def spelled(path: Path) -> str:
    """A path as one writes it."""
    return "/".join(map(str, path)) or "the model itself"


def listed(paths: Collection[Path]) -> str:
    """The first three paths, and how many more there are."""
    first = ", ".join(map(spelled, itertools.islice(paths, 3)))
    return first if len(paths) <= 3 else f"{first} and {len(paths) - 3} more"


@contextlib.contextmanager
def attributes(module: Any, **values: Any) -> Iterator[None]:
    """Within it a module has other attributes, though it is frozen."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, v in values.items():
            object.__setattr__(module, name, v)
        yield
    finally:
        for name, v in before.items():
            object.__setattr__(module, name, v)


def refuse(path: Path, cls: type) -> None:
    """Raises the ValueError of a layer with running statistics whose class nobody knows."""
    raise ValueError(
        f"{spelled(path)}, a {cls.__module__}.{cls.__name__}, has running statistics and is of "
        f"no known class: say how to read it, batch_norms={{{cls.__name__}: Adapter(...)}}, or "
        "None in place of the Adapter if it is no BatchNorm"
    )


def left_alone(path: Path, cls: type) -> None:
    """Leaves a layer with running statistics whose class nobody knows as it is."""


Hook = Callable[[Call], Any]
Stranger = Callable[[Path, type], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Hooking:
    """A hook, and the layers whose calls it is given.

    A layer of a subclass that calls its parent's `__call__` is met there, where the arguments
    have the parent's meaning; one that does not is a stranger.

    Attributes:
      hook: see `intercept`.
      norms: classes of BatchNorms.
      others: further classes.
      stranger: is given the path and class of a layer with running statistics that the hook
        cannot be given, as its class is unknown, or its `__call__` is its own.
      met: paths of BatchNorms whose calls the hook was given, or an outer one in its stead.
      replaces: whether it puts another norm in place of a BatchNorm. Such hooks are within all
        others, which are given no calls of a layer that is no BatchNorm any more.
    """

    replaces: ClassVar[bool] = False

    hook: Hook
    norms: BatchNorms
    others: tuple[type, ...]
    stranger: Stranger
    met: set[Path] = dataclasses.field(default_factory=set)

    def kind(self, cls: type) -> tuple[type, Adapter | None] | None:
        """Whose `__call__` the hook stands around, and how a BatchNorm is read."""
        for base in cls.__mro__:
            if self.norms.get(base) is not None:
                return base, self.norms[base]
            if base in self.norms:
                break
        for base in cls.__mro__:
            if base in self.others:
                return (base if callable_by(base) else cls), None
        return None

    def given(self, call: Call) -> Any:
        """What the hook returns."""
        return self.hook(call)

    def swapped(self, path: Path) -> str:
        """The name of the norm that the hook puts in place of a BatchNorm; "" of none."""
        return ""

    def around(self, path, layer, kind, adapter, function) -> Callable[..., Any]:
        """The function, the `__call__` of a layer, with the hook around it."""
        if adapter is not None:
            self.met.add(path)
        within = function.call.swapped if isinstance(function, _Around) else ""
        if within and within not in SWAPPED_BATCH_NORMS and not self.replaces:
            if not (self.others and isinstance(layer, self.others)):
                return function
            adapter = None
        swapped = self.swapped(path) or within
        return _Around(self.given, Call(path, layer, (), {}, function, kind, adapter, swapped))

    def check(self, path: Path, layer: Any, called: bool) -> None:
        """Reports a stranger, after a method of it has returned."""
        cls = type(layer)
        known = [base for base in cls.__mro__ if base in self.norms]
        if known:
            passed_by = called and self.norms[known[0]] is not None and path not in self.met
        else:
            # A known layer may share its scope with this one.
            passed_by = path not in self.met and _owns_stats(layer)
        if passed_by:
            self.stranger(path, cls)


@dataclasses.dataclass(frozen=True)
class _Around:
    """A hook around the `__call__` of a layer; the call is without its arguments."""

    hook: Hook
    call: Call

    def __call__(self, *args, **kwargs):
        return self.hook(self.call._replace(args=args, kwargs=kwargs))


def callable_by(cls: type) -> bool:
    """Whether instances of the class can be called."""
    return any("__call__" in vars(base) for base in cls.__mro__)


def own_calls(kind: type) -> Iterator[Callable[..., Any]]:
    """The function that is a class's `__call__`, and those that decorators have wrapped."""
    function = kind.__call__
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _owns_stats(layer):
    if isinstance(layer, nnx.Module):
        return any(isinstance(v, nnx.BatchStat) for v in vars(layer).values())
    stats = layer.variables.get("batch_stats", {}) if layer.scope is not None else {}
    return any(not isinstance(v, Mapping) for v in stats.values())
