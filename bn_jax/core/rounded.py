"""A sum rounded once, of which the transposed map converts the cotangent for each term."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bn_jax.core.arrays import apart


def rounded_sum(*terms: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The sum, in dtype, of arrays of one shape and one (wider) dtype.

    As `sum(terms).astype(dtype)`. Transposed, that would give every term one and the same
    cotangent in the wider dtype; here it comes to each by a conversion of its own, on CPU from
    another name, which XLA can take into whatever sum the term is transposed to.
    """
    return _rounded_sum.bind(*terms, dtype=dtype)


def _sum(*terms, dtype):
    return functools.reduce(operator.add, terms).astype(dtype)


def _transposed(cotangent, *terms, dtype):
    found = []
    for term in terms:
        linear = ad.is_undefined_primal(term)
        found.append(cotangent.astype(term.aval.dtype) if linear else None)
        cotangent = apart(cotangent)
    return found


def _batched(terms, dims, *, dtype):
    size = next(v.shape[d] for v, d in zip(terms, dims, strict=True) if d is not None)
    terms = (
        jnp.moveaxis(v, d, 0) if d is not None else jnp.broadcast_to(v, (size, *v.shape))
        for v, d in zip(terms, dims, strict=True)
    )
    return _rounded_sum.bind(*terms, dtype=dtype), 0


_rounded_sum = Primitive("rounded_sum")
_rounded_sum.def_impl(_sum)
_rounded_sum.def_abstract_eval(lambda term, *_, dtype: term.update(dtype=dtype))
ad.deflinear2(_rounded_sum, _transposed)
batching.primitive_batchers[_rounded_sum] = _batched
mlir.register_lowering(_rounded_sum, mlir.lower_fun(_sum, multiple_results=False))
