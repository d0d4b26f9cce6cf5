"""A Linen model whose layers are called through hooks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict, Scope

from bn_jax.surgery.calls import Hooking, own_calls

_FLAG = "bn_jax.surgery"


@dataclasses.dataclass(frozen=True, eq=False)
class Intercepted:
    """A Linen model within interceptors.

    All that the model has it has too: `apply`, `init`, `bind`, `tabulate`, its fields. It
    pickles where its hooks do.

    Attributes:
      model: as it was.
      hooks: the outermost first.
      number: of this and no other.
    """

    model: nn.Module
    hooks: tuple[Hooking, ...]
    number: int = dataclasses.field(default_factory=itertools.count().__next__)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return _Within(self, self.model.apply)(variables, *args, **kwargs)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return _Within(self, self.model.init)(rngs, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _within(self, getattr(self.model, name))

    def __reduce__(self) -> tuple[Any, ...]:
        return Intercepted, (self.model, self.hooks)  # a number is good in one process

    @contextlib.contextmanager
    def intercepting(self):
        """Within it the layers of the model are called through the hooks."""
        with nn.intercept_methods(self._through):
            yield

    def _through(self, function, args, kwargs, context):
        layer, called = context.module, context.method_name == "__call__"
        _mark(layer, self.number)
        for hooking in reversed(self.hooks if called else ()):
            kind = hooking.kind(type(layer))
            if kind and context.orig_method.func in own_calls(kind[0]):
                function = hooking.around(layer.path, layer, *kind, function)
        y = function(*args, **kwargs)
        for hooking in self.hooks if context.method_name != "setup" else ():
            hooking.check(layer.path, layer, called)
        return y


@dataclasses.dataclass(frozen=True)
class _Within:
    """A method of a model, or a model that is bound to variables, within interceptors."""

    outer: Intercepted
    inner: Any

    def __call__(self, *args, **kwargs):
        if callable(method := kwargs.get("method")):
            kwargs["method"] = self._marked(method)
        with self.outer.intercepting():
            return _within(self.outer, self.inner(*args, **kwargs))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _within(self.outer, getattr(self.inner, name))

    def _marked(self, method):
        @functools.wraps(method)
        def marked(module, *args, **kwargs):
            _mark(module, self.outer.number)
            return method(module, *args, **kwargs)

        return marked


def _within(outer, v):
    bound = isinstance(v, nn.Module) and v.scope is not None
    return _Within(outer, v) if bound or inspect.ismethod(v) else v


class _Scope(Scope):
    """A scope that has its path among its flags, as have those below it.

    `nn.jit` takes two modules for one, and what it has traced of the first for both, if their
    fields and the flags of their scopes are alike. Hooks are no field; what they do depends on
    the path. So the model's number and the path are a flag.
    """

    def push(self, *args, **kwargs):
        scope = super().push(*args, **kwargs)
        _mark_scope(scope, self.flags[_FLAG][0])
        return scope


def _mark(module, number):
    if module.scope is not None:
        _mark_scope(module.scope, number)


def _mark_scope(scope, number):
    if type(scope) is Scope:
        scope.__class__ = _Scope
    scope.flags = FrozenDict({**scope.flags, _FLAG: (number, *scope.path)})
