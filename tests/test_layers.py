"""What the layers for Linen and NNX have in common, through one adapter for each."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from layers import assert_close, make_linen, make_nnx

from bn_jax import cumulative_mean, debiased_ema, ema

NAMES = ["BatchNorm", "GhostBatchNorm", "BatchRenorm"]
RNG = np.random.default_rng(0)
# 4 of 8 examples, of unequal means and stds that no tolerance hides.
BATCHES = np.float32(RNG.normal(size=(4, 8, 3)) * [0.5, 1, 2] + RNG.normal(size=(4, 1, 3)))
X = BATCHES[0]
SCALE, BIAS = np.float32(RNG.normal(size=(2, 3)))


@pytest.fixture(params=[make_linen, make_nnx], ids=["linen", "nnx"])
def make(request):
    """`make(name, features, **fields)`: a layer in the adapter of its framework."""
    return request.param


def trained(layer, batches=BATCHES, **given):
    """The last output, and the variables after all batches."""
    variables = layer.init(batches[0])
    for x in batches:
        y, variables = layer.apply(variables, x, **given)
    return y, variables


def test_the_variables_start_as_those_of_flax(make):
    got = make().init(X)
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert_close(got, {"scale": ones, "bias": zeros, "mean": zeros, "var": ones})
    assert {v.dtype for v in got.values()} == {jnp.dtype("float32")}


def weights_of(estimator, momentum, t):
    """What the start and each of t batches weigh in the running statistics."""
    if estimator is cumulative_mean:
        return 0, np.full(t, 1 / t)
    weights = (1 - momentum) * momentum ** np.arange(t - 1, -1, -1.0)
    start = 0 if estimator is debiased_ema else momentum**t
    return start, weights / weights.sum() * (1 - start)


@pytest.mark.parametrize("estimator", [ema, debiased_ema, cumulative_mean])
@pytest.mark.parametrize("unbiased", [False, True])
def test_estimators(make, estimator, unbiased):
    layer = make(estimator=estimator, unbiased=unbiased, momentum=0.7)
    _, variables = trained(layer)
    start, weights = weights_of(estimator, 0.7, len(BATCHES))
    mean = weights @ np.float64(BATCHES).mean(1)
    var = start + weights @ np.float64(BATCHES).var(1, ddof=int(unbiased))
    assert_close((variables["mean"], variables["var"]), (mean, var), 1e-6)
    y, after = layer.apply(variables, X, train=False)
    assert_close(y, reference.normalize(X, mean, var))
    assert_close(after, variables, 0)
    if estimator is ema:
        assert "count" not in variables
    else:
        np.testing.assert_array_equal(variables["count"], [4, 4, 4])


def test_momentum_may_be_a_schedule_of_the_updates_so_far(make):
    def momentum(count):
        return jnp.where(count < 2, 0.0, 0.5)

    _, variables = trained(make(momentum=momentum))
    # 0 keeps batch 2 alone; then batches 3 and 4 by halves.
    weights = [0, 0.25, 0.25, 0.5]
    assert_close(variables["mean"], weights @ np.float64(BATCHES).mean(1), 1e-6)
    assert_close(variables["var"], weights @ np.float64(BATCHES).var(1), 1e-6)
    assert variables["count"] == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_not_finite_is_skipped(make, name):
    layer = make(name, skip_nonfinite=True)
    bad = BATCHES.copy()
    bad[1, 2, 1:] = np.inf, np.nan
    _, got = trained(layer, bad)
    _, without_the_batch = trained(layer, BATCHES[[0, 2, 3]])
    _, clean = trained(layer)
    for stat in ("mean", "var"):
        np.testing.assert_array_equal(got[stat][1:], without_the_batch[stat][1:])
        np.testing.assert_array_equal(got[stat][0], clean[stat][0])


@pytest.mark.parametrize("name", NAMES)
def test_one_element_per_feature_is_refused_in_training_alone(make, name):
    layer, x = make(name), X[:1]
    variables = layer.init(x)
    with pytest.raises(ValueError, match=r"one element per feature.*\(1, 3\)"):
        layer.apply(variables, x)
    y, _ = layer.apply(variables, x, train=False)
    assert_close(y, reference.normalize(x, np.zeros(3), np.ones(3)), 1e-6)
    y, _ = make(name, allow_single=True).apply(variables | {"bias": BIAS}, x)
    np.testing.assert_array_equal(y[0], BIAS)


# In evaluation, and there alone, the three are one function.
in_training_and_evaluation = pytest.mark.parametrize(
    ("name", "train"), [*((name, True) for name in NAMES), ("BatchNorm", False)]
)


@in_training_and_evaluation
def test_activation(make, name, train):
    fused, plain = make(name, activation=nn.gelu), make(name)
    _, variables = trained(plain)

    def outputs(layer, activation):
        def f(x, scale, bias):
            given = variables | {"scale": scale, "bias": bias}
            return activation(layer.apply(given, x, train)[0])

        @jax.jit
        def value_and_gradients(*arguments):
            y, vjp = jax.vjp(f, *arguments)
            return y, vjp(jnp.ones_like(y))

        return value_and_gradients(X, SCALE, BIAS)

    assert_close(outputs(fused, lambda y: y), outputs(plain, nn.gelu), 1e-5)


@in_training_and_evaluation
@pytest.mark.parametrize("shape", [(3,), (1, 1, 3), (4, 1, 3), (4, 2, 3)])
def test_scale_and_bias_in_the_call(make, name, train, shape):
    fields = {"group_size": 2} if name == "GhostBatchNorm" else {}
    layer, x = make(name, use_scale=False, use_bias=False, **fields), X.reshape(4, 2, 3)
    scale, bias = np.float32(RNG.normal(size=(2, *shape)))
    variables = layer.init(x)
    assert "scale" not in variables
    assert "bias" not in variables
    y, after = layer.apply(variables, x, train, scale=scale, bias=bias)
    plain, plain_after = layer.apply(variables, x, train)
    one_rank = (1,) * (3 - len(shape)) + shape
    assert_close(y, plain * scale.reshape(one_rank) + bias.reshape(one_rank), 1e-6)
    assert_close(after, plain_after, 0)


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_scale_and_bias_from_two_places_or_of_another_shape_are_refused(make, name):
    layer = make()
    with pytest.raises(ValueError, match=f"use_{name}=False"):
        layer.apply(layer.init(X), X, **{name: SCALE})
    layer = make(use_scale=False, use_bias=False)
    with pytest.raises(ValueError, match=rf"{name} of shape \(8,\)"):
        layer.apply(layer.init(X), X, **{name: np.ones(8)})


@pytest.mark.parametrize("name", NAMES)
def test_update_stats_false_leaves_the_running_statistics(make, name):
    layer = make(name)
    _, variables = trained(layer)
    want, moved = layer.apply(variables, X)
    y, after = layer.apply(variables, X, update_stats=False)
    np.testing.assert_array_equal(y, want)
    assert_close(after, variables, 0)
    assert np.all(moved["mean"] != variables["mean"])


@pytest.mark.parametrize(
    ("group_size", "strided", "groups"),
    [
        (3, False, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (4, True, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (32, False, [list(range(8))]),
    ],
)
def test_ghost_batches_are_batches_one_after_another(make, group_size, strided, groups):
    fields = {"momentum": 0.9, "unbiased": True, "estimator": debiased_ema}
    ghost = make("GhostBatchNorm", group_size=group_size, strided=strided, **fields)
    plain = make(**fields)
    y, got = ghost.apply(ghost.init(X), X)
    want = plain.init(X)
    for group in groups:
        want_y, want = plain.apply(want, X[group])
        assert_close(y[np.array(group)], want_y)
    assert_close(got, want)
    assert_close(ghost.apply(got, X, train=False), plain.apply(got, X, train=False), 0)


def test_renorm_without_correction_is_batch_norm(make):
    renorm, paper = make("BatchRenorm", r_max=1.0, d_max=0.0), make("BatchRenorm")
    want, want_variables = trained(make())
    for layer in (renorm, paper):  # the paper's schedules start with it
        y, variables = trained(layer)
        assert variables.pop("count") == 4
        np.testing.assert_array_equal(y, want)
        assert_close(variables, want_variables, 0)


def test_renorm_in_bounds_that_are_schedules(make):
    layer = make("BatchRenorm", r_max=lambda t: 1 + 0.1 * t, d_max=lambda t: 0.2 * t)
    variables = layer.init(X) | {"scale": SCALE, "bias": BIAS}
    for t, x in enumerate(BATCHES):
        mean, var = (np.float64(variables[n]) for n in ("mean", "var"))
        y, variables = layer.apply(variables, x)
        seen, sigma = reference.moments(x), np.sqrt(var + 1e-5)
        r = np.clip(np.sqrt(seen.var + 1e-5) / sigma, 1 / (1 + 0.1 * t), 1 + 0.1 * t)
        d = np.clip((seen.mean - mean) / sigma, -0.2 * t, 0.2 * t)
        want = reference.normalize(x, seen.mean, seen.var) * r + d
        assert_close(y, want * SCALE + BIAS)
        assert_close(variables["mean"], reference.ema(mean, seen.mean, 0.99, 8))
        assert_close(variables["var"], reference.ema(var, seen.var, 0.99, 8))


def test_mask(make):
    layer, mask = make(), np.arange(8)[:, None] < 5
    variables = layer.init(X)
    y, after = layer.apply(variables, np.where(mask, X, np.nan), mask=mask)
    want, want_after = layer.apply(variables, X[:5])
    assert_close((y[:5], after), (want, want_after))
    with pytest.raises(ValueError, match=r"mask of shape \(8,\)"):
        layer.apply(variables, X, mask=np.ones(8))
    y, after = layer.apply(variables, X, mask=np.zeros((8, 1)))
    assert np.all(np.isfinite(y))
    assert_close(after, variables, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("estimator", [ema, debiased_ema, cumulative_mean])
def test_one_example_leaves_the_running_variance(make, name, estimator):
    layer = make(name, estimator=estimator)
    _, before = trained(layer)
    _, after = layer.apply(before, X, mask=np.arange(8)[:, None] == 3)
    np.testing.assert_array_equal(after["var"], before["var"])
    assert np.array_equal(after["mean"], before["mean"]) == (estimator is not ema)
    if "count" in before:
        np.testing.assert_array_equal(after["count"], before["count"])


MASKS = np.arange(8)[None, :, None] < np.reshape([5, 3, 0, 8], (4, 1, 1))


@pytest.mark.parametrize("replicate", ["pmap", "shard_map"], indirect=True)
def test_groups_of_replicas_share_statistics_weighted_by_their_masks(make, replicate):
    groups = [[0, 3], [1, 2]]
    layer = make(axis_name="batch", axis_index_groups=groups, unbiased=True)
    variables = layer.init(X)
    one = replicate(lambda x, mask: layer.apply(variables, x, mask=mask))
    y, after = one(BATCHES, MASKS)
    for group in groups:
        together, mask = BATCHES[group].reshape(-1, 3), MASKS[group].reshape(-1, 1)
        want_y, want = make(unbiased=True).apply(variables, together, mask=mask)
        assert_close(y[np.array(group)].reshape(-1, 3), want_y)
        for i in group:
            assert_close(jax.tree.map(lambda v, i=i: v[i], after), want)


def test_all_replicas_vmapped_leave_one_set_of_statistics(make):
    layer = make(axis_name="batch", unbiased=True)
    variables = layer.init(X)
    # out_axes=None is refused of what vmap takes for a value of each replica.
    one = functools.partial(layer.apply, variables)
    mapped = jax.vmap(lambda x, mask: one(x, mask=mask), axis_name="batch", out_axes=(0, None))
    y, after = mapped(BATCHES, MASKS)
    together, mask = BATCHES.reshape(-1, 3), MASKS.reshape(-1, 1)
    want_y, want = make(unbiased=True).apply(variables, together, mask=mask)
    assert_close((y.reshape(-1, 3), after), (want_y, want))


def test_axes_from_an_iterator_are_there_for_every_call(make):
    layer, want = make(features=(8, 3), axis=iter([1, 2])), make(features=(8, 3), axis=(1, 2))
    assert_close(trained(layer, BATCHES[None])[1], trained(want, BATCHES[None])[1], 0)


@pytest.mark.parametrize("name", ["mean", "var"])
@pytest.mark.parametrize("train", [True, False])
def test_statistics_of_another_shape_are_refused(make, name, train):
    layer = make()
    with pytest.raises(ValueError, match=rf"{name} of shape \(1,\)"):
        layer.apply(layer.init(X) | {name: jnp.ones(1)}, X, train)


def test_half_precision_costs_the_statistics_nothing(make):
    x = np.float32(np.random.default_rng(0).normal(100, 1, (512, 3)))
    layer = make(dtype=jnp.bfloat16, momentum=0.0)
    y, variables = layer.apply(layer.init(x), x)
    seen = reference.moments(x)
    assert_close((variables["mean"], variables["var"]), (seen.mean, seen.var), 1e-6)
    evaluated, _ = layer.apply(variables, x, train=False)
    for got in (y, evaluated):
        assert got.dtype == jnp.bfloat16
        # Nothing but the result is rounded, to 8 bits: flax.nnx is off by .27.
        np.testing.assert_allclose(got, reference.batch_norm(x)[0], rtol=2**-8, atol=1e-4)


def test_float64_input_leaves_the_statistics_float32(make, x64):
    layer, x = make(), np.float64(X)
    y, variables = layer.apply(layer.init(x), x)
    assert y.dtype == jnp.float64
    assert {v.dtype for v in variables.values()} == {jnp.dtype("float32")}


def dtypes_of_stats(variables):
    return variables["mean"].dtype, variables["var"].dtype


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("param_dtype", "x_dtype"),
    [
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.float64),
        (jnp.float64, jnp.float32),
        (jnp.float64, jnp.float64),
    ],
)
def test_statistics_are_of_the_wider_of_float32_and_param_dtype(
    make, name, param_dtype, x_dtype, x64
):
    want = (jnp.float64,) * 2 if param_dtype == jnp.float64 else (jnp.float32,) * 2
    layer, xs = make(name, param_dtype=param_dtype), jnp.asarray(BATCHES, x_dtype)
    variables = layer.init(xs[0])
    assert dtypes_of_stats(variables) == want
    step = jax.jit(lambda variables, x: layer.apply(variables, x)[::-1])
    variables, _ = jax.lax.scan(step, variables, xs)
    assert dtypes_of_stats(variables) == want


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_float64_is_exact_at_inference(make, name, x64):
    # 0.03 apart with float32 statistics, whose mean of 1e6 is off by as much.
    x = RNG.normal(1e6, 1, (512, 3))
    fields = {"group_size": 512} if name == "GhostBatchNorm" else {}
    layer = make(name, param_dtype=jnp.float64, momentum=0.0, **fields)
    y, _ = layer.apply(trained(layer, [x])[1], x, train=False)
    np.testing.assert_allclose(y, reference.batch_norm(x)[0], atol=1e-8)


@pytest.mark.parametrize("param_dtype", [jnp.complex64, jnp.complex128])
def test_complex_statistics_are_as_wide_as_complex_parameters(make, param_dtype, x64):
    layer, z = make(param_dtype=param_dtype, momentum=0.5), np.complex128(X + 1j * BATCHES[1])
    variables = layer.init(z)
    want = param_dtype, jnp.finfo(param_dtype).dtype
    assert dtypes_of_stats(variables) == want
    y, after = layer.apply(variables, z)
    assert dtypes_of_stats(after) == want
    var = np.mean(np.abs(z - z.mean(0)) ** 2, axis=0)
    tolerance = 4 * float(jnp.finfo(param_dtype).eps)
    assert_close(after["mean"], 0.5 * z.mean(0), tolerance)
    assert_close(after["var"], 0.5 + 0.5 * var, tolerance)
    assert_close(y, (z - z.mean(0)) / np.sqrt(var + 1e-5), 1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_statistics_keep_the_dtype_that_they_are_loaded_in(make, dtype, x64):
    layer = make(param_dtype=jnp.float64)
    variables = layer.init(X)
    loaded = {n: variables[n].astype(dtype) for n in ("mean", "var")}
    _, after = layer.apply(variables | loaded, X)
    assert dtypes_of_stats(after) == (dtype, dtype)


def test_float64_that_is_not_enabled_is_float32(make):
    layer = make(param_dtype=jnp.float64, use_scale=False, use_bias=False)
    assert dtypes_of_stats(layer.init(X)) == (jnp.float32,) * 2


def test_complex_input(make):
    fields = {"stats_dtype": jnp.complex64} if make is make_nnx else {}
    layer, z = make(momentum=0.9, **fields), BATCHES[0] + 2j * BATCHES[1]
    y, variables = layer.apply(layer.init(z), z)
    exact = np.complex128(z)
    mean = exact.mean(0)
    var = np.mean(np.abs(exact - mean) ** 2, axis=0)
    assert_close(y, (exact - mean) / np.sqrt(var + 1e-5))
    assert_close(variables["mean"], 0.1 * mean)
    assert_close(variables["var"], 0.9 + 0.1 * var)
    assert variables["mean"].dtype == jnp.complex64
    assert variables["var"].dtype == jnp.float32
    evaluated, _ = layer.apply(variables, z, train=False)
    assert_close(evaluated, (exact - 0.1 * mean) / np.sqrt(0.9 + 0.1 * var + 1e-5))


def test_complex_input_for_a_real_mean_is_refused():
    layer, z = make_nnx(), X + 1j
    with pytest.raises(TypeError, match="complex64"):
        layer.apply(layer.init(z), z)


def test_a_debiased_average_with_a_schedule_is_refused(make):
    layer = make(estimator=debiased_ema, momentum=lambda count: 0.9)
    variables = layer.init(X)
    with pytest.raises(TypeError, match="one momentum"):
        layer.apply(variables, X)


@pytest.mark.parametrize(
    ("x_dtype", "name", "features", "fields"),
    [
        ("float32", "BatchNorm", 3, {}),
        ("bfloat16", "BatchNorm", 3, {}),
        ("float32", "BatchNorm", 4, {"axis": 1, "momentum": 0.5, "epsilon": 0.1}),
        ("float32", "BatchNorm", (4, 3), {"axis": (1, -1)}),
        ("float32", "BatchNorm", 3, {"dtype": jnp.bfloat16, "unbiased": True}),
        ("bfloat16", "BatchNorm", 3, {"param_dtype": jnp.bfloat16, "estimator": debiased_ema}),
        ("float32", "BatchNorm", 3, {"use_scale": False, "use_bias": False}),
        (
            "bfloat16",
            "GhostBatchNorm",
            3,
            {"group_size": 1, "strided": True, "activation": nn.relu},
        ),
        (
            "bfloat16",
            "BatchRenorm",
            3,
            {"estimator": cumulative_mean, "r_max": 2.0, "d_max": 1.0},
        ),
    ],
)
def test_linen_and_nnx_give_equal_numbers(x_dtype, name, features, fields):
    x = jnp.asarray(BATCHES.reshape(2, 4, 4, 3), x_dtype)
    both = []
    for make in (make_linen, make_nnx):
        layer = make(name, features, **fields)
        y, variables = trained(layer, x)
        both.append((y, layer.apply(variables, x[0], train=False)[0], variables))
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), *both)
