"""A sum that is rounded once: as the plain one, in every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.core.rounded import rounded_sum

A, B, C = jax.random.normal(jax.random.key(0), (3, 4, 5, 6))
CT = jnp.asarray(jax.random.normal(jax.random.key(1), (4, 5, 6)), jnp.bfloat16)


def ours(*terms):
    return rounded_sum(*terms, dtype=jnp.bfloat16)


def plain(*terms):
    return sum(terms).astype(jnp.bfloat16)


TRANSFORMED = {
    "value": lambda f: f(A, B, C),
    "jit": lambda f: jax.jit(f)(A, B, C),
    "jvp": lambda f: jax.jvp(f, (A, B, C), (B, C, A)),
    "vjp": lambda f: jax.vjp(f, A, B, C)[1](CT),
    "vjp of one": lambda f: jax.vjp(lambda b: f(A, b, C), B)[1](CT),
    "vmap": lambda f: jax.vmap(f)(A, B, C),
    "vmap over some": lambda f: jax.vmap(f, (1, None, 0), 1)(A, B[:, 0], C[0][:, None]),
    "vmap of vjp": lambda f: jax.vmap(lambda a, ct: jax.vjp(f, a, B[0], C[0])[1](ct))(A, CT),
    "vjp of vmap": lambda f: jax.vjp(jax.vmap(f, (0, None, 0)), A, B[0], C)[1](CT),
    "linearize": lambda f: jax.linearize(f, A, B, C)[1](B, C, A),
    "remat": lambda f: jax.vjp(jax.checkpoint(f), A, B, C)[1](CT),
}


@pytest.mark.parametrize("how", TRANSFORMED)
def test_as_the_plain_sum(how):
    got, want = (TRANSFORMED[how](f) for f in (ours, plain))
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_each_term_has_a_cotangent_of_its_own():
    """XLA has as many conversions as there are terms."""

    def sums(f, ct):
        return [v.sum() for v in jax.vjp(f, A, B, C)[1](ct)]

    lowered = jax.jit(functools.partial(sums, ours)).lower(CT).as_text()
    assert lowered.count("stablehlo.convert") == 3
    assert jax.jit(functools.partial(sums, plain)).lower(CT).as_text().count("convert") == 1
