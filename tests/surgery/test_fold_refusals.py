"""BatchNorms that are not folded, and why; none of them stops the others."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import Layer, chain, compact, in_nnx, norm, output, two_layers, with_variables

import bn_jax.linen
import bn_jax.nnx
from bn_jax.surgery import fold

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
BatchNorm = functools.partial(bn_jax.linen.BatchNorm, use_running_average=True)
both_homes = pytest.mark.parametrize("home", ["linen", "nnx"])


def check(model, variables, x=X, call=None, **options):
    """Folds; another input gives what it gave."""
    call = call or {}
    folded, other = fold(model, variables, x, **options, **call), 1 - 2 * x[::-1]
    want = output(model, variables, other, **call)
    got = output(folded.model, folded.variables, other, **call)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        scale = np.abs(a).max(tuple(range(a.ndim - 1)))
        assert (np.abs(a - b) <= 1e-4 * scale).all()
    return folded


def refused(model, variables, x=X, **call):
    """The reasons, of a model of which nothing can be folded and so nothing changes."""
    folded = check(model, variables, x, call)
    assert folded.pairs == []
    assert jax.tree.structure(folded.variables) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, folded.variables, variables)
    return folded.refused


def of_linen(function, **options):
    return check(*with_variables(compact(function), X), **options)


# What is next to the BatchNorm ------------------------------------------------------------


def with_residual(x):
    h = nn.Dense(4)(x)
    return nn.relu(BatchNorm()(h)) + h


def norm_twice(x):
    norms = BatchNorm()
    return nn.relu(norms(nn.Dense(4)(x))) + nn.relu(norms(nn.Dense(4)(x)))


def vmapped_norm(layer, axis, x):
    """Copies of a BatchNorm over an axis of what one layer before them returns."""
    lifted = nn.vmap(
        bn_jax.linen.BatchNorm,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=axis,
        out_axes=axis,
    )
    return lifted(use_running_average=True)(layer(jnp.stack([x] * 3)))


def in_the_call(x):
    h = nn.Dense(4)(x)
    return BatchNorm(use_scale=False)(h, scale=2 * jnp.ones(4))


def batched(x):
    return nn.DenseGeneral(4, batch_dims=(0,))(x)


REFUSED = {
    "residual": (with_residual, "add"),
    "norm twice": (norm_twice, "BatchNorm_0 is called 2 times"),
    "activation": (lambda x: BatchNorm()(nn.tanh(nn.Dense(4)(x))), "its input comes from tanh"),
    "vmap of the norm": (lambda x: vmapped_norm(nn.DenseGeneral((2, 4)), 2, x), ""),
    "vmap of the norm over examples": (lambda x: vmapped_norm(nn.Dense(4), 0, x), ""),
    "batch axes": (lambda x: BatchNorm(axis=(0, -1))(batched(x)), "batch axes"),
    "scale": (in_the_call, "its scale come"),
    "cast": (
        lambda x: BatchNorm()(nn.Dense(4)(x).astype(jnp.bfloat16).astype(jnp.float32)),
        "convert_element_type",
    ),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(function, reason):
    (said,) = refused(*with_variables(compact(function), X)).values()
    assert reason in said


def in_scan(s, x):
    return jax.lax.scan(lambda h, _: (s.n(s.a(h)), None), x, length=2)[0]


# The BatchNorm n, and the layer a before it.
REFUSED_IN_NNX = {
    "branch": (lambda s, x: jax.lax.cond(x[0, 0, 0] > 0, s.n, lambda h: -h, s.a(x)), "branch"),
    "loop": (in_scan, "loop"),
    "map": (lambda s, x: jax.lax.map(s.n, s.a(x)), "loop"),
    "layer in a loop": (lambda s, x: s.n(jax.lax.map(s.a, x)), "scan"),
    "vmap over features": (lambda s, x: jax.vmap(s.n, in_axes=2, out_axes=2)(s.a(x)), ""),
    "transposed": (lambda s, x: s.n(s.a(x).swapaxes(1, 2)), "transpose"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED_IN_NNX.values(), ids=REFUSED_IN_NNX)
def test_refused_in_nnx(function, reason):
    x = jnp.asarray(RNG.normal(size=(3, 4, 4)), jnp.float32)
    (said,) = refused(*with_variables(in_nnx(two_layers, function)), x).values()
    assert reason in said


def test_statistics_of_the_batch_are_refused():
    def function(x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))

    model, variables = with_variables(compact(function), X, train=False)
    (reason,) = fold(model, variables, X, train=True).refused.values()
    assert "statistics of the batch" in reason


def padded(padding, *size):
    return norm(), Layer("Conv", (5, size or (3,)), {"padding": padding})


UPPER = {"mask": np.float32(np.triu(np.ones((1, 4, 4))))}
BETWEEN, POOL = {"input_dilation": 2, "padding": 0}, Layer(lambda x: nn.max_pool(x, (2,)))
OTHER_AXIS, ZEROS = "does not have the BatchNorm's axis", "pads with zeros"
BESIDE = {
    "transposed": (
        norm(),
        Layer("ConvTranspose", (5, (3,)), {"padding": "VALID"}),
        "is transp",
    ),
    "zeros between": (norm(), Layer("Conv", (5, (3,)), BETWEEN), "zeros between"),
    "mask": (norm(), Layer("Conv", (4, (1,)), UPPER), "has a mask"),
    "axis": (Layer("Dense", (4,)), norm(axis=-2), OTHER_AXIS),
    "both axes": (Layer("Dense", (4,)), norm(axis=(-2, -1)), OTHER_AXIS),
    "axis, the layer after": (norm(axis=-2), Layer("Dense", (4,)), OTHER_AXIS),
    "same": (*padded("SAME"), ZEROS),
    "number": (*padded(1), ZEROS),
    "one side": (*padded([(0, 1)]), ZEROS),
    "a number and a pair": (*padded((0, (0, 1)), 3, 3), ZEROS),
    "1x1": (*padded(1, 1), ZEROS),
    "activation": (norm(activation=nn.relu), Layer("Dense", (5,)), "BatchNorm's activation"),
    "max-pool": (norm(), POOL, Layer("Conv", (5, (1,)), {"padding": "VALID"}), "reduce_window"),
}


@both_homes
@pytest.mark.parametrize("case", BESIDE)
def test_refused_beside_another_layer(home, case):
    shape = (3, 4, 4, 4) if "pair" in case else (3, 4, 4)
    x = jnp.asarray(RNG.normal(size=shape), jnp.float32)
    *layers, why = BESIDE[case]
    model, variables, _ = chain(home, x, *layers)
    (reason,) = refused(model, variables, x).values()
    assert why in reason


def test_every_reason_is_the_norms_own():
    """JAX writes out a function that is called twice, relu here, only once."""

    def function(x):
        for _ in range(3):
            x = nn.Dense(4)(x)
            x = BatchNorm()(jax.nn.relu(x))
            x = nn.softmax(x)
        return x

    reasons = list(of_linen(function).refused.values())
    assert len(reasons) == 3
    for reason in reasons:
        assert "its input comes from relu" in reason
        assert "too" not in reason


def test_a_value_that_is_kept_is_used():
    def function(x):
        class Keeping(nn.Module):
            @nn.compact
            def __call__(self, x):
                h = nn.Dense(4)(x)
                kept = self.variable("cache", "h", lambda: jnp.zeros_like(h))
                kept.value = h
                return BatchNorm()(h)

        return Keeping()(x)

    model, variables = with_variables(compact(function), X)
    folded = fold(model, variables, X)
    want = model.apply(variables, X, mutable="cache")[1]
    got = folded.model.apply(folded.variables, X, mutable="cache")[1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)


def test_a_norm_that_runs_twice_but_is_traced_once():
    jitted = nnx.jit(lambda layer, x: layer(x))

    def within_jax(s, x):
        inner = jax.jit(lambda x: s.n(x))
        return inner(s.a(x)) + inner(s.b(x))

    for function in (within_jax, lambda s, x: jitted(s.n, s.a(x)) + jitted(s.n, s.b(x))):
        model, variables = with_variables(in_nnx(two_layers, function))
        assert refused(model, variables).keys() == {("n",)}


# Variables that are read elsewhere, or are no variables ---------------------------------


def read_elsewhere(collection, name, of_norm, x):
    """A layer that is also read by its variables, of whose use little is to be seen."""
    dense, norm = nn.Dense(4, name="tied"), BatchNorm(name="first")
    h = nn.tanh(norm(dense(x)))
    read = (norm if of_norm else dense).variables[collection][name]
    return jnp.concatenate([1e6 * h, jnp.sin(x @ jnp.diag(jnp.ravel(read)[:4]))], -1)


READ = {
    "kernel": ("params", "kernel", False), "bias": ("params", "bias", False),
    "scale": ("params", "scale", True), "statistics": ("batch_stats", "var", True),
}  # fmt: skip


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_what_is_read_elsewhere_too_stays(read):
    def function(x):
        return nn.relu(BatchNorm(name="second")(nn.Dense(4)(read_elsewhere(*read, x))))

    folded = of_linen(function)
    assert [p.norm for p in folded.pairs] == [("second",)]
    assert f"has a {read[1]} that Dense_0 takes too" in folded.refused["first",]


def test_a_tied_decoder_within_a_branch_and_a_returned_kernel():
    def within(x):
        dense = nn.Dense(4)
        h = nn.tanh(BatchNorm()(dense(x)))
        kernel = dense.variables["params"]["kernel"]
        return jax.lax.cond(h[0, 0] > 9, lambda: h @ kernel.T, lambda: h)

    def returned(x):
        dense = nn.Dense(4)
        return nn.tanh(BatchNorm()(dense(x))), dense.variables["params"]["kernel"]

    for function in (within, returned):
        folded = of_linen(function)
        assert "takes too" in folded.refused["BatchNorm_0",]


class Standardised(nn.Dense):
    """The weights' mean and variance are those of the layer, whatever is stored."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        kernel = (kernel - kernel.mean(0, keepdims=True)) / (
            kernel.std(0, keepdims=True) + 1e-3
        )
        return x @ kernel + self.param("bias", self.bias_init, (self.features,))[None]


class Scaled(nn.Dense):
    """Its call goes through that of its parent, with another kernel."""

    def param(self, name, *args, **kwargs):
        v = super().param(name, *args, **kwargs)
        return v / jnp.linalg.norm(v) if name == "kernel" else v


def squared(tree):
    return jax.tree.map(jnp.square, tree)


class Squared(nn.Module):
    """A parametrised kernel: the layer reads another than is stored."""

    @nn.compact
    def __call__(self, x):
        init = self.is_initializing()
        return nn.map_variables(nn.Dense, "params", squared, init=init)(4)(x)


DERIVED = {
    "weight norm": (lambda x: nn.WeightNorm(nn.Dense(4))(x), "computes with a kernel"),
    "spectral norm": (
        lambda x: nn.SpectralNorm(nn.Dense(4))(x, update_stats=False), "computes with a kernel"
    ),
    "parametrised": (lambda x: Squared()(x), "computes with a"),
    "standardised": (lambda x: Standardised(4)(x), "its input comes from add"),
    "scaled": (lambda x: Scaled(4)(x), "does this Scaled compute"),
}  # fmt: skip


@pytest.mark.parametrize("case", DERIVED)
def test_a_derived_kernel_does_not_stop_the_others(case):
    layer, why = DERIVED[case]

    def function(x):
        x = nn.relu(BatchNorm(name="first")(nn.Dense(4)(x)))
        x = nn.relu(BatchNorm(name="second")(layer(x)))
        return nn.relu(BatchNorm(name="third")(nn.Dense(4)(x)))

    folded = of_linen(function)
    assert {p.norm[0] for p in folded.pairs} == {"first", "third"}
    assert why in folded.refused["second",]


NNX_DERIVED = {
    "LoRA": lambda rngs: nnx.LoRALinear(
        4, 4, lora_rank=2, rngs=rngs, b_initializer=nnx.initializers.ones
    ),
    "weight norm": lambda rngs: nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs),
}


@pytest.mark.parametrize("case", NNX_DERIVED)
def test_a_derived_kernel_of_nnx_does_not_stop_the_others(case):
    def layers():
        rngs = nnx.Rngs(0)
        return two_layers() | {"c": NNX_DERIVED[case](rngs), "o": norms(4, rngs=rngs)}

    norms = functools.partial(bn_jax.nnx.BatchNorm, use_running_average=True)
    model, variables = nnx.split(
        in_nnx(layers, lambda s, x: nnx.relu(s.o(s.c(s.m(s.b(nnx.relu(s.n(s.a(x)))))))))()
    )
    variables = jax.tree.map(lambda v: v + 0.3, variables)
    folded = check(model, variables)
    assert {p.norm for p in folded.pairs} == {("n",), ("m",)}
    assert folded.refused.keys() == {("o",)}


class Sharing(nnx.Module):
    """Two norms, or the layers before them, that have Variables in common."""

    def __init__(self, what):
        for name, layer in two_layers().items():
            setattr(self, name, layer)
        layers = two_layers()
        self.c, self.o = layers["a"], layers["n"]
        if what == "layer":
            self.m = self.n
        for name in {"statistics": ("mean", "var"), "scale": ("scale", "bias")}.get(what, ()):
            setattr(self.m, name, getattr(self.n, name))
        if what == "kernel":
            self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.o(self.c(nnx.tanh(self.m(self.b(nnx.tanh(self.n(self.a(x))))))))


@pytest.mark.parametrize("what", ["statistics", "scale", "kernel", "layer", "nothing"])
def test_layers_that_share_are_not_folded_and_others_are(what):
    model, variables = with_variables(lambda: Sharing(what))
    folded = check(model, variables)
    shared = {"n", "m"} if what == "nothing" else set()
    assert {p.norm[0] for p in folded.pairs} == {"o"} | shared
    if what == "kernel":
        assert "a has a kernel that b takes too: give it one" in folded.refused["n",]
        assert "b has a kernel that a takes too: give it one" in folded.refused["m",]


# What the layer computes -----------------------------------------------------------------


def bent(x, kernel, *args, **kwargs):
    """Linear where inputs are small, as those of a sample may be."""
    return jnp.sin(jax.lax.dot_general(x, kernel, *args, **kwargs))


Bent = functools.partial(nn.Dense, dot_general=bent)


def test_a_sample_that_shows_nothing():
    """All zeros, of which noise is of the size of 1."""

    def function(x):
        y = BatchNorm(name="within")(Bent(4)(x))
        return nn.tanh(y), BatchNorm(name="other")(nn.Dense(4)(x))

    model, variables = with_variables(compact(function), X)
    folded = fold(model, variables, jnp.zeros_like(X))
    assert [p.norm for p in folded.pairs] == [("other",)]
    assert "does this Dense compute" in folded.refused["within",]


@pytest.mark.parametrize("faulty", [(0,), (3,), (1, 2), (0, 1, 2, 3), (4, 7), ()])
def test_every_pair_at_fault_is_found_and_no_other(faulty):
    def function(x):
        for i in range(8):
            dense = Bent(4) if i in faulty else nn.Dense(4)
            x = jnp.tanh(BatchNorm(name=f"n{i}")(dense(x)))
        return x

    folded = of_linen(function)
    assert folded.refused.keys() == {(f"n{i}",) for i in faulty}
    assert len(folded.pairs) == 8 - len(faulty)


def test_excluded_layers_stay():
    def function(x):
        for name in ("head_a", "head_b", "body"):
            x = nn.relu(BatchNorm(name=name)(nn.Dense(4)(x)))
        return x

    folded = of_linen(function, exclude=["head_*"])
    assert [p.norm for p in folded.pairs] == [("body",)]
    assert set(folded.refused.values()) == {"it is excluded"}
    with pytest.raises(ValueError, match="no BatchNorm fits 'neck'"):
        of_linen(function, exclude="neck")


def line(x):
    return nn.relu(BatchNorm()(nn.Dense(4)(x)))


NOT_COMPARED = {
    "NaN": (line, X.at[2, 3].set(jnp.nan), "1 values of the sample are not finite"),
    "infinity": (line, X.at[2, 3].set(jnp.inf), "1 values of the sample are not finite"),
    "empty": (line, X[:0], "NaN, infinite or empty"),
    "NaN out": (lambda x: jnp.log(line(x) - 1), X, "for the sample is NaN, infinite or empty"),
    "infinite": (lambda x: -jnp.inf * (1 + line(x)), X, "is NaN, infinite or empty"),
}


@pytest.mark.parametrize(("function", "x", "message"), NOT_COMPARED.values(), ids=NOT_COMPARED)
def test_what_cannot_be_compared_is_refused(function, x, message):
    model, variables = with_variables(compact(function), X)
    with pytest.raises(ValueError, match=message):
        fold(model, variables, x)


FACTORS = {
    "negative variance": ({"var": -0.1}, {}, "its var is -0.1 at least"),
    "variance less than minus epsilon": ({"var": -1e-4}, {}, "no finite factor"),
    "negative epsilon": ({"var": 1e-5}, {"epsilon": -1e-4}, "with epsilon=-0.0001"),
    "epsilon of 0": ({"var": 0.0}, {"epsilon": 0.0}, "with epsilon=0"),
    "infinite variance": ({"var": jnp.inf}, {}, "1 of 4 values of its var are not finite"),
    "scale": ({"scale": jnp.nan}, {}, "1 of 4 values of its scale are not finite"),
    "mean": ({"mean": -jnp.inf}, {}, "1 of 4 values of its mean are not finite"),
}


@pytest.mark.parametrize("norms", [bn_jax.linen.BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize(("bad", "fields", "why"), FACTORS.values(), ids=FACTORS)
def test_a_factor_that_is_not_finite_is_named(norms, bad, fields, why):
    """And does not stop others where its output does not show it."""
    if norms is bn_jax.linen.BatchNorm and fields.get("epsilon", 0) < 0:
        pytest.skip("ours is not constructed with a negative epsilon")

    def net(show):
        def function(x):
            norm = norms(use_running_average=True, name="bad", **fields)
            y, good = norm(nn.Dense(4)(x)), BatchNorm(name="good")(nn.Dense(4)(x))
            return (y if show else jnp.nan_to_num(y, posinf=0, neginf=0)), good

        return compact(function)

    model, variables = with_variables(net(False), X)
    for leaves in (variables["batch_stats"]["bad"], variables["params"]["bad"]):
        for name in leaves.keys() & bad.keys():
            leaves[name] = leaves[name].at[1].set(bad[name])
    folded = fold(model, variables, X)
    assert [p.norm for p in folded.pairs] == [("good",)]
    assert why in folded.refused["bad",]
    if np.isnan(output(net(True), variables, X)[0]).any():
        with pytest.raises(ValueError, match=f"empty; bad: .*{why}"):
            fold(net(True), variables, X)


def test_a_subnormal_variance():
    model, variables = with_variables(compact(line), X)
    variables["batch_stats"]["BatchNorm_0"]["var"] = jnp.full(4, 1e-40)
    assert len(check(model, variables).pairs) == 1


def test_an_object_that_hides_its_arrays_is_refused():
    class Opaque:
        def __init__(self, y):
            self.y = y

    model, variables = with_variables(compact(lambda x: Opaque(line(x))), X)
    with pytest.raises(ValueError, match="returns a Opaque, which is no pytree"):
        fold(model, variables, X)


def test_rounding_that_a_reader_would_see_is_refused():
    """Of a mean of 1e6 standard deviations float32 leaves little."""
    model, variables = with_variables(compact(lambda x: BatchNorm()(nn.Dense(4)(x))), X)
    stats = variables["batch_stats"]["BatchNorm_0"]
    variables["params"]["Dense_0"]["bias"] = stats["mean"] = jnp.full(4, 1e6 + 1 / 3)
    (reason,) = fold(model, variables, X).refused.values()
    assert "more than 0.001: these are rounding errors" in reason


def test_a_model_that_insists_on_float32():
    class Insisting(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = line(x)
            assert y.dtype == jnp.float32
            return jax.lax.scan(lambda c, v: (c + v.sum(), v), jnp.float32(0), y)

    model, variables = with_variables(Insisting(), X)
    assert len(check(model, variables).pairs) == 1


def test_modes():
    """Of a model that trains wherever statistics are mutable, and one told by position."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            mutable = self.is_mutable_collection("batch_stats")
            if not self.is_initializing() and train:
                raise AssertionError
            return nn.relu(nn.BatchNorm(use_running_average=not mutable)(nn.Dense(4)(x)))

    model, variables = with_variables(Net(), X, train=False)
    assert len(fold(model, variables, X, False).pairs) == 1


def test_half_precision_is_tried_in_float64():
    """What bfloat16 would hide is seen, and rounding is not taken for it."""

    def function(x):
        half = {"dtype": jnp.bfloat16}
        for name, dense in (("a", nn.Dense), ("b", slightly_bent), ("c", nn.Dense)):
            x = nn.relu(BatchNorm(name=name, **half)(dense(4, **half)(x)))
        return x

    model, variables = with_variables(compact(function), X)
    folded = fold(model, variables, X, tolerance=0.05)
    assert [p.norm for p in folded.pairs] == [("a",), ("c",)]
    assert "does this Dense compute" in folded.refused["b",]
    refused = fold(model, variables, X).refused
    assert "does this Dense compute" in refused["b",]
    assert "these are rounding errors" in refused["a",]


def slightly_bent(*args, **fields):
    def product(*args, **kwargs):
        y = jax.lax.dot_general(*args, **kwargs)
        return y + 1e-2 * jnp.sin(3 * y)

    return nn.Dense(*args, dot_general=product, **fields)


def test_an_activation_with_a_learnt_slope():
    def function(x):
        norm = BatchNorm(activation=nn.PReLU())
        return nn.BatchNorm(use_running_average=True)(nn.PReLU()(norm(nn.Dense(4)(x))))

    folded = of_linen(function)
    assert [p.norm for p in folded.pairs] == [("BatchNorm_0",)]
    assert "its input comes from" in folded.refused["BatchNorm_1",]
