"""Optimizers by name; their learning rate may be traced, which is how sweeps sweep it."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import optax

from bn_jax.errors import UserError

# From a learning rate, or a schedule of it, to the optimizer.
Alias = Callable[[Any], optax.GradientTransformation]

# The update for a learning rate of 1, of the other sign.
RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": optax.identity,
    "sgd_momentum": lambda: optax.trace(0.9),
    "sgd_nesterov": lambda: optax.trace(0.9, nesterov=True),
    "rmsprop": lambda: optax.scale_by_rms(decay=0.9, eps=1e-7, eps_in_sqrt=False),
    "adam": optax.scale_by_adam,
}


def optimizer(
    name: str | Alias,
    learning_rate: jax.Array | float,
    *,
    schedule: optax.Schedule | None = None,
    l2: float = 0.0,
    weight_decay: float = 0.0,
    decay_norms: bool = False,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Gradient descent by one of `RULES`, or by an optimizer of optax or of the user.

    Args:
      name: `sgd`; `sgd_momentum` (0.9); `sgd_nesterov`; `rmsprop` (decay .9); `adam`; or a
        function of the learning rate, which may be a schedule: see `parsed`.
      learning_rate: may be traced.
      schedule: factor on it at every step; by default constant.
      l2: the gradient of l2 / 2 |w|^2 is added to the gradient.
      weight_decay: learning rate times this times w is added to the update (Loshchilov &
        Hutter 2019: "decoupled").
      decay_norms: both shrink scales and biases too, and not only kernels.
      clip: the largest norm of all gradients together.
    """
    decayed = None if decay_norms else kernels
    rate = learning_rate
    if schedule is not None:
        rate = lambda count: learning_rate * schedule(count)  # noqa: E731

    if not isinstance(name, str):
        clipped = optax.clip_by_global_norm(clip) if clip else optax.identity()
        decay = optax.add_decayed_weights(l2, decayed) if l2 else optax.identity()
        return optax.chain(clipped, decay, name(rate))
    parts = (
        optax.clip_by_global_norm(clip) if clip else None,
        optax.add_decayed_weights(l2, decayed) if l2 else None,
        RULES[name](),
        optax.add_decayed_weights(weight_decay, decayed) if weight_decay else None,
        optax.scale_by_learning_rate(rate),
    )
    return optax.chain(*(part for part in parts if part is not None))


def parsed(text: str) -> str | Alias:
    """Returns one of `RULES`, or an alias of optax with its options.

    Args:
      text: `adam`, `adamw`, `adamw(weight_decay=0.05)`, `lion(b1=0.9)`, ...

    Raises:
      UserError: optax has no such alias, or that has no such option.
    """
    if text in RULES:
        return text
    try:
        call = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("no call with options")
        name = call.func.id
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as e:
        raise UserError(f"--optimizer={text}: write a name, or name(option=value)") from e
    alias, taken = getattr(optax, name, None), _taken(name)
    if "learning_rate" not in taken:
        known = [n for n in dir(optax) if n not in RULES and "learning_rate" in _taken(n)]
        near = difflib.get_close_matches(name, known)
        raise UserError(
            f"--optimizer={text}: choose from {', '.join(RULES)}, or an alias of optax such as "
            f"{', '.join(near) or 'adamw, lion'}, or package.module:name"
        )
    if unknown := [option for option in options if option not in taken]:
        own = ", ".join(taken[1:])
        raise UserError(f"--optimizer={text}: {name} has no {unknown[0]} among {own}")
    return functools.partial(cast(Alias, alias), **options)


def _taken(name: str) -> list[str]:
    """The arguments of one of optax's functions; none where it is no function."""
    found = getattr(optax, name, None)
    return list(inspect.signature(found).parameters) if inspect.isfunction(found) else []


def kernels(params: Any) -> Any:
    """True for weights, False for the scales and biases of norms, and every other bias."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("scale", "bias"), params
    )
