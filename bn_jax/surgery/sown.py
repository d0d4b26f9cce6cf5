"""What hooks leave among a model's variables, and so comes out of `nn.remat` and the like."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from flax import nnx, traverse_util
from flax.errors import TraceContextError

from bn_jax.surgery.calls import Path
from bn_jax.surgery.intercept import SOWN


def sow(layer: Any, name: str, new: Any, merged: Callable[[Any, Any], Any]) -> None:
    """Leaves a value at a layer, merged with what a call before has left there."""

    def both(old, new):
        return new if old is None else merged(old, new)

    if isinstance(layer, nn.Module):
        layer.sow(SOWN, name, new, init_fn=lambda: None, reduce_fn=both)
    else:
        old = getattr(layer, f"sown_{name}", None)
        value = both(None if old is None else old.get_value(), new)
        setattr(layer, f"sown_{name}", nnx.Intermediate(value))


def sown(variables: Any, name: str) -> dict[Path, Any]:
    """What was left under a name, by the paths of the layers.

    Args:
      variables: as `apply_and_update` returns them.
      name: as in `sow`.
    """
    if isinstance(variables, nnx.State):
        flat: Any = nnx.to_flat_state(variables)
        return {p[:-1]: v.get_value() for p, v in flat if p[-1] == f"sown_{name}"}
    flat = traverse_util.flatten_dict(variables.get(SOWN, {}))
    return {p[:-1]: v for p, v in flat.items() if p[-1] == name}


@contextlib.contextmanager
def coming_out() -> Iterator[None]:
    """Within it an error of a transformation that layers leave something in has a remedy.

    Raises:
      ValueError: an NNX scan or vmap has no place for a new Variable; or a transformation of
        JAX is none of Flax's, and nothing comes out of it.
    """
    try:
        yield
    except (jax.errors.UnexpectedTracerError, TraceContextError) as e:
        raise ValueError(
            "a layer is called within a transformation of the model that nothing comes out of "
            "(jax.jit, jax.vmap of a method): call the model without it, or take Flax's"
        ) from e
    except (TypeError, ValueError) as e:
        if "sown_" not in str(e):
            raise
        raise ValueError(
            "a BatchNorm is within an nnx.scan or nnx.vmap that what it is given does not come "
            "out of: say nnx.StateAxes({nnx.Intermediate: 0, ...}) there, before its other axes"
        ) from e
