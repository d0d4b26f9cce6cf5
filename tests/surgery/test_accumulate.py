import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze, unfreeze
from jax.sharding import PartitionSpec as P

import bn_jax.linen
import bn_jax.nnx
from bn_jax import debiased_ema
from bn_jax.surgery.accumulate import accumulate, accumulate_exactly

RNG = np.random.default_rng(0)
X = (2 * RNG.normal(size=(24, 3)) + np.arange(24)[:, None] / 6).astype(np.float32)
T = np.sin(X @ RNG.normal(size=(3, 4))).astype(np.float32)
EPSILON = 1e-5
FORMS = (accumulate, accumulate_exactly)
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


class LinenNet(nn.Module):
    norm: type
    dropout: float = 0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5)(x)
        x = nn.tanh(self.norm(use_running_average=not train, name="first")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(4)(x)
        x = nn.tanh(self.norm(name="second")(x, use_running_average=not train))
        return nn.Dense(4)(x)


class NnxNet(nnx.Module):
    def __init__(self, norm, rngs):
        self.body = nnx.Sequential(
            nnx.Linear(3, 5, rngs=rngs), norm(5, rngs=rngs), nnx.tanh,
            nnx.Dropout(0.0, rngs=rngs), nnx.Linear(5, 4, rngs=rngs),
        )  # fmt: skip
        self.tail = nnx.List([norm(4, rngs=rngs)])
        self.out = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.tail[0](self.body(x))))


@functools.cache
def linen(norm):
    """A model, its variables, and its call in training."""
    model = LinenNet(norm)
    return model, model.init(jax.random.key(0), X, train=False), {"train": True}


@functools.cache
def of_nnx(norm):
    return *nnx.split(NnxNet(norm, nnx.Rngs(0))), {}


SUBJECTS = {
    "linen": (linen, bn_jax.linen.BatchNorm),
    "flax linen": (linen, nn.BatchNorm),
    "nnx": (of_nnx, bn_jax.nnx.BatchNorm),
    "flax nnx": (of_nnx, nnx.BatchNorm),
}
each_subject = pytest.mark.parametrize(("build", "norm"), SUBJECTS.values(), ids=SUBJECTS)


def mean_square(y, target):
    return jnp.mean((y - target) ** 2)


def parts(tree, count):
    return jax.tree.map(lambda v: jnp.reshape(v, (count, -1, *jnp.shape(v)[1:])), tree)


def params_of(variables):
    if isinstance(variables, nnx.State):
        return nnx.filter_state(variables, nnx.Param)
    return variables["params"]


def with_params(variables, params):
    if isinstance(variables, nnx.State):
        return nnx.merge_state(variables, params)
    return {**variables, "params": params}


def on_one_batch(model, variables, loss, batch, **call):
    """What `accumulate_exactly` says it returns, by autodiff of the model on one batch."""
    inputs, targets = batch
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)

    def value(params):
        own = with_params(variables, params)
        if isinstance(model, nnx.GraphDef):
            module = nnx.merge(model, own, copy=True)
            return loss(module(*inputs, **call), targets), nnx.state(module)
        y, updates = model.apply(own, *inputs, mutable=["batch_stats"], **call)
        return loss(y, targets), {**variables, **updates}

    of = jax.value_and_grad(value, has_aux=True)
    (value, after), gradients = of(params_of(variables))
    return value, gradients, after


def assert_close(got, want, tolerance=1e-5):
    """Relative to the largest element of the tree: biases before a BatchNorm have none."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    largest = max(np.max(np.abs(v)) for v in jax.tree.leaves(want))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance * largest)
    jax.tree.map(close, got, want)


def stats_of(variables):
    if isinstance(variables, nnx.State):
        return nnx.filter_state(variables, nnx.BatchStat)
    return variables["batch_stats"]


def dtypes(tree):
    return [v.dtype for v in jax.tree.leaves(tree)]


def assert_same_step(got, want, tolerance=1e-5):
    for a, b in zip(got[:2], want[:2], strict=True):
        assert_close(a, b, tolerance)
    for place in (params_of, stats_of):
        assert_close(place(got[2]), place(want[2]), max(tolerance, 1e-5))
    assert dtypes(got[2]) == dtypes(want[2])


# Most programs here run once.
QUICKLY = {"compiler_options": {"xla_backend_optimization_level": 0}}


def jitted(form, model, loss=mean_square, options=QUICKLY, **call):
    """variables, batch -> value, gradients, variables."""
    step = functools.partial(form, model, **call)
    return jax.jit(lambda variables, batch: step(variables, loss, batch), **options)


@each_subject
def test_exactly_the_big_batch(build, norm):
    """Of one example each, too, which has no variance of its own."""
    model, variables, call = build(norm)
    count = len(X) if build is linen else 4
    got = jitted(accumulate_exactly, model, **call)(variables, parts((X, T), count))
    assert_same_step(got, jitted(on_one_batch, model, **call)(variables, (X, T)))


# Not Flax's, which float64 input gives other statistics than float32 (Linen) or warns (NNX).
@pytest.mark.parametrize("home", ["linen", "nnx"])
def test_exactly_the_big_batch_in_float64(home, x64):
    model, variables, call = SUBJECTS[home][0](SUBJECTS[home][1])
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params_of(variables))
    variables = with_params(variables, params)
    batch = (np.float64(X), np.float64(T))
    got = jitted(accumulate_exactly, model, **call)(variables, parts(batch, 4))
    want = jitted(on_one_batch, model, **call)(variables, batch)
    assert_close(got[0], want[0], 1e-9)
    assert_close(got[1], want[1], 1e-9)
    assert dtypes(got[2]) == dtypes(variables)


@pytest.mark.parametrize("name", ["linen", "flax nnx"])
def test_accumulated_as_by_multisteps(name):
    """The update when optax has averaged the gradients of one micro-batch each."""
    model, variables, call = SUBJECTS[name][0](SUBJECTS[name][1])
    optimizer = optax.MultiSteps(optax.sgd(1.0), 4)
    params = params_of(variables)
    state, values = optimizer.init(params), []
    step = jitted(on_one_batch, model, **call)
    for batch in zip(*parts((X, T), 4), strict=True):
        value, gradients, _ = step(variables, batch)
        updates, state = optimizer.update(gradients, state, params)
        values.append(value)
    value, gradients, _ = jitted(accumulate, model, **call)(variables, parts((X, T), 4))
    assert_close(value, np.mean(values))
    assert_close(jax.tree.map(jnp.negative, gradients), updates)


ESTIMATORS = {
    "schedule": {"momentum": lambda count: 1 - 1 / (count + 2)},
    "debiased": {"momentum": 0.8, "estimator": debiased_ema, "unbiased": True},
}


@pytest.mark.parametrize("fields", ESTIMATORS.values(), ids=ESTIMATORS)
def test_two_updates_exactly(fields):
    model, variables, call = linen(functools.partial(bn_jax.linen.BatchNorm, **fields))
    step = jitted(accumulate_exactly, model, **call)
    got = want = variables
    for scale in (1, 2):
        got = step(got, parts((scale * X, T), 4))[2]
        want = jitted(on_one_batch, model, **call)(want, (scale * X, T))[2]
    assert_close(got, want)


def inputs_of_layers(params, count):
    """In float64: what the layers see, each micro-batch normalised by itself."""
    kernels = [np.float64(params[f"Dense_{i}"]["kernel"]) for i in range(2)]
    first = [x @ kernels[0] for x in parts(np.float64(X), count)]
    second = [
        np.tanh((h - h.mean(0)) / np.sqrt(h.var(0) + EPSILON)) @ kernels[1] for h in first
    ]
    return {"first": np.concatenate(first), "second": np.concatenate(second)}


@pytest.mark.parametrize(
    ("norm", "unbiased"),
    [
        (nn.BatchNorm, False),
        (bn_jax.linen.BatchNorm, False),
        (functools.partial(bn_jax.linen.BatchNorm, unbiased=True), True),
    ],
)
def test_running_statistics_are_of_all_micro_batches(norm, unbiased):
    model, variables, call = linen(functools.partial(norm, momentum=0.75))
    *_, after = jitted(accumulate, model, **call)(variables, parts((X, T), 4))
    for name, seen in inputs_of_layers(variables["params"], 4).items():
        stats = after["batch_stats"][name]
        np.testing.assert_allclose(stats["mean"], 0.25 * seen.mean(0), 1e-5, 1e-5)
        var = 0.75 + 0.25 * seen.var(0, ddof=int(unbiased))
        np.testing.assert_allclose(stats["var"], var, 1e-5)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        norm = functools.partial(bn_jax.linen.BatchNorm, use_running_average=False)
        x = nn.tanh(norm(momentum=0.5, name="first")(x, mask=mask))
        return nn.Dense(4)(norm()(nn.Dense(3)(x), mask=mask))


def weighted(y, targets):
    target, weights = targets
    return jnp.mean(weights * jnp.mean((y - target) ** 2, -1))


def masked_batch():
    """Of 4 micro-batches of 6 the mask leaves 6, 3, 1 and 0."""
    mask = np.concatenate([np.arange(6) < n for n in (6, 3, 1, 0)])
    return mask, ((X, mask[:, None]), (T, np.float32(mask / mask.mean())))


def test_masks_exactly():
    mask, batch = masked_batch()
    model = Masked()
    variables = model.init(jax.random.key(0), *batch[0])
    step = jitted(accumulate_exactly, model, weighted)
    got = step(variables, parts(batch, 4))
    assert_same_step(got, jitted(on_one_batch, model, weighted)(variables, batch))
    unmasked = (X[mask], np.ones((mask.sum(), 1))), (T[mask], np.ones(mask.sum()))
    assert_same_step(got, jitted(on_one_batch, model, weighted)(variables, unmasked))
    *_, after = jitted(accumulate, model, weighted)(variables, parts(batch, 4))
    stats = after["batch_stats"]["first"]
    np.testing.assert_allclose(stats["mean"], 0.5 * np.float64(X[mask]).mean(0), 1e-5)
    np.testing.assert_allclose(stats["var"], 0.5 + 0.5 * np.float64(X[mask]).var(0), 1e-5)


class Shared(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train=True):
        norm, dense = self.norm(use_running_average=not train), nn.Dense(3)
        return nn.Dense(4)(nn.tanh(norm(dense(nn.tanh(norm(dense(x)))))))


@pytest.mark.parametrize("norm", [bn_jax.linen.BatchNorm, nn.BatchNorm])
def test_a_layer_that_is_called_twice(norm):
    model = Shared(norm)
    variables = model.init(jax.random.key(0), X)
    got = jitted(accumulate_exactly, model)(variables, parts((X, T), 4))
    assert_same_step(got, jitted(on_one_batch, model)(variables, (X, T)))


class InCommon(nnx.Module):
    """Two layers with the same statistics, which they move in turn, `z` first."""

    def __init__(self, rngs):
        norm = functools.partial(bn_jax.nnx.BatchNorm, 3, momentum=0.5, rngs=rngs)
        self.z, self.a, self.out = norm(), norm(), nnx.Linear(3, 4, rngs=rngs)
        self.a.mean, self.a.var = self.z.mean, self.z.var

    def __call__(self, x):
        return self.out(self.z(nnx.tanh(self.a(3 * self.z(x) + 7))))


def test_layers_that_share_statistics_move_them_in_the_order_of_calls():
    model, variables = nnx.split(InCommon(nnx.Rngs(0)))
    got = jitted(accumulate_exactly, model)(variables, parts((X, T), 4))
    assert_same_step(got, jitted(on_one_batch, model)(variables, (X, T)))
    twice = jax.tree.map(lambda v: np.stack([v, v]), (X, T))
    got = jitted(accumulate, model)(variables, twice)
    assert_same_step(got, jitted(on_one_batch, model)(variables, (X, T)))


@pytest.mark.parametrize("home", ["linen", "nnx"])
def test_ghost_groups_that_divide_the_micro_batch(home):
    build = {"linen": linen, "nnx": of_nnx}[home]
    norm = getattr(bn_jax, home).GhostBatchNorm
    model, variables, call = build(functools.partial(norm, group_size=3, momentum=0.8))
    got = jitted(accumulate, model, **call)(variables, parts((X, T), 4))
    assert_same_step(got, jitted(on_one_batch, model, **call)(variables, (X, T)))


def test_renorm_corrects_towards_the_statistics_before_the_step():
    bounds = {"r_max": 2.0, "d_max": 1.0}
    model, variables, call = linen(functools.partial(bn_jax.linen.BatchRenorm, **bounds))
    batch, step = parts((X, T), 4), jitted(on_one_batch, model, **call)
    values = [step(variables, one)[0] for one in zip(*batch, strict=True)]
    value, _, after = jitted(accumulate, model, **call)(variables, batch)
    np.testing.assert_allclose(value, np.mean(values), 1e-6)
    assert after["batch_stats"]["first"]["count"] == 1


def mean_output(y, _):
    return jnp.mean(y)


class Noise(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(
            self.param("p", nn.initializers.ones, ()) * x
        )


@each_form
def test_micro_batches_have_their_own_dropout(form):
    model, ones, key = Noise(), np.ones((4, 100), np.float32), jax.random.key(3)
    variables = {"params": {"p": jnp.ones(())}}
    value, gradients, _ = form(
        model, variables, mean_output, (ones, ones), rngs={"dropout": key}
    )
    wanted = [
        model.apply(variables, one, rngs={"dropout": jax.random.fold_in(key, i)}).mean()
        for i, one in enumerate(ones)
    ]
    assert len(set(map(float, wanted))) > 1
    np.testing.assert_allclose(value, np.mean(wanted), 1e-6)
    np.testing.assert_allclose(gradients["p"], np.mean(wanted), 1e-6)


class Partly(nn.Module):
    """One layer that is in training, one that is not, one that keeps its statistics."""

    @nn.compact
    def __call__(self, x):
        norm = bn_jax.linen.BatchNorm
        x = norm(use_running_average=True, name="fixed")(nn.Dense(3)(x))
        x = norm(use_running_average=False, name="keeps")(nn.Dense(3)(x), update_stats=False)
        return nn.Dense(4)(norm(use_running_average=False)(nn.Dense(3)(nn.tanh(x))))


@each_form
def test_frozen_dicts_come_back_as_such(form):
    model, variables, call = linen(bn_jax.linen.BatchNorm)
    step = jitted(form, model, **call)
    batches, given = parts((X, T), 3), freeze(variables)
    expected = step(variables, batches)
    value, gradients, after = step(given, batches)
    assert jax.tree.structure(after) == jax.tree.structure(given)
    assert jax.tree.structure(gradients) == jax.tree.structure(given["params"])
    assert_same_step((value, unfreeze(gradients), unfreeze(after)), expected)


def test_layers_that_do_not_move():
    model = Partly()
    variables = model.init(jax.random.key(0), X)
    got = jitted(accumulate_exactly, model)(variables, parts((X, T), 4))
    assert_same_step(got, jitted(on_one_batch, model)(variables, (X, T)))
    *_, after = jitted(accumulate, model)(variables, parts((X, T), 4))
    for name in ("fixed", "keeps"):
        np.testing.assert_array_equal(after["batch_stats"][name]["mean"], 0)
    assert np.all(after["batch_stats"]["BatchNorm_0"]["mean"] != 0)


def test_half_precision_is_summed_in_float32():
    """Of 512 gradients of about 1 a bfloat16 sum stops at 256."""
    model = nn.Dense(1, use_bias=False, param_dtype=jnp.bfloat16)
    x = np.ones((512, 1, 1), np.float32)
    variables = {"params": {"kernel": jnp.ones((1, 1), jnp.bfloat16)}}
    _, gradients, _ = accumulate(model, variables, mean_output, (x, x))
    assert gradients["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(gradients["kernel"]), 1)


def test_replicas(make_mesh):
    """4 devices of 2 micro-batches are one device with two that are 4 times as large."""
    model, variables, call = linen(functools.partial(bn_jax.linen.BatchNorm, axis_name="batch"))
    batch = parts((X, T), 2)

    def step(variables, batch):
        value, gradients, after = accumulate(model, variables, mean_square, batch, **call)
        # shard_map has summed the gradients of replicated parameters.
        mean = jax.tree.map(lambda g: g / 4, gradients)
        return jax.lax.pmean(value, "batch"), mean, after

    sharded = jax.shard_map(
        step, mesh=make_mesh(batch=4), in_specs=(P(), P(None, "batch")), out_specs=P()
    )
    alone, *_ = linen(bn_jax.linen.BatchNorm)
    want = jitted(accumulate, alone, **call)(variables, batch)
    assert_same_step(jax.jit(sharded)(variables, batch), want)


def test_activations_of_one_micro_batch_at_a_time():
    """The memory of the compiled programs, 8 micro-batches to a batch of 4,096."""
    model, variables, call = linen(bn_jax.linen.BatchNorm)
    batch = jax.tree.map(lambda v: np.tile(v[:16], (256, 1)), (X, T))

    def memory(form, batch):
        program = jitted(form, model, options={}, **call).lower(variables, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    whole = memory(on_one_batch, batch)
    assert memory(accumulate, parts(batch, 8)) < whole / 4
    assert memory(accumulate_exactly, parts(batch, 8)) < whole / 4


def test_passes_end_where_they_may():
    """The products of matrices: 3 layers, of which every pass needs those before its own."""
    model, variables, call = linen(bn_jax.linen.BatchNorm)
    step = jitted(accumulate_exactly, model, options={}, **call)
    program = step.lower(variables, parts((X, T), 4)).compile().as_text()
    forwards, gradient, backwards = 1 + 2, 3 + 3 + 2, (2 + 2 + 1) + (1 + 1)
    assert program.count(" dot(") == forwards + gradient + backwards


def variant(name, **fields):
    return linen(functools.partial(getattr(bn_jax.linen, name), **fields))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (functools.partial(variant, "GhostBatchNorm"), "GhostBatchNorm first .* accumulate"),
        (functools.partial(variant, "BatchRenorm"), "BatchRenorm first .* use accumulate"),
        (functools.partial(of_nnx, functools.partial(bn_jax.nnx.BatchNorm, axis_name="i")),
         "body/layers/1 has axis_name='i'"),
    ],
)  # fmt: skip
def test_what_is_not_of_the_batch_is_refused(build, message):
    model, variables, call = build()
    # Under that axis, which a layer looks for before it is refused.
    step = functools.partial(accumulate_exactly, model, variables, mean_square, **call)
    with pytest.raises(ValueError, match=message):
        jax.vmap(lambda *batch: step(batch), axis_name="i", axis_size=1)(
            *(v[None] for v in parts((X, T), 4))
        )


class Transformed(nn.Module):
    """Blocks within a transformation of Flax; one of them called twice."""

    around: object = None
    norm: type = bn_jax.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        block = Block if self.around is None else self.around(Block)
        x = block(self.norm, not train, name="a")(x)
        shared = block(self.norm, not train, name="b")
        return shared(shared(x))


class Block(nn.Module):
    norm: type
    inference: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="dense")(x)
        return nn.tanh(self.norm(use_running_average=self.inference, name="norm")(x))


@pytest.mark.parametrize(
    ("form", "norm", "around"),
    [
        (accumulate, nn.BatchNorm, nn.remat),
        (accumulate, bn_jax.linen.BatchNorm, nn.jit),
        (accumulate_exactly, bn_jax.linen.BatchNorm, lambda block: nn.remat(nn.jit(block))),
        (accumulate_exactly, nn.BatchNorm, None),  # remat of the norm
    ],
)
def test_within_remat_and_jit(form, norm, around):
    """Moments come out: the step is that of the model without the transformation."""
    plain = Transformed(None, norm)
    lifted = Transformed(around, norm) if around else Transformed(None, nn.remat(norm))
    variables = plain.init(jax.random.key(0), X)
    batch = parts((X, RNG.normal(size=(len(X), 4)).astype(np.float32)), 4)
    want = jitted(form, plain)(variables, batch)
    assert_same_step(jitted(form, lifted)(variables, batch), want)


class Scanned(nn.Module):
    told: bool

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0} | ({"bn_jax.surgery": 0} if self.told else {})
        scanned = nn.scan(
            Step, variable_axes=axes, split_rngs={"params": True}, length=3
        )  # fmt: skip
        return scanned()(x, None)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(3)(x)
        return nn.tanh(nn.BatchNorm(use_running_average=False)(x)), None


def test_within_a_scan():
    """Every step has statistics of its own. The scan must be told to let Moments out."""
    model = Scanned(told=True)
    variables = model.init(jax.random.key(0), X)
    batch = parts((X, X), 4)
    loss = lambda output, targets: jnp.mean((output - targets) ** 2)  # noqa: E731
    value, gradients, after = jitted(accumulate, model, loss)(variables, batch)
    each = [
        jitted(on_one_batch, model, loss)(variables, (batch[0][i], batch[1][i]))
        for i in range(4)
    ]
    np.testing.assert_allclose(value, np.mean([v for v, _, _ in each]), 1e-5)
    mean = jax.tree.map(lambda *g: sum(g) / 4, *(g for _, g, _ in each))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), gradients, mean)
    # Groups of one size, so that the mean of all is the mean of the means.
    moved = jax.tree.map(lambda *v: sum(v) / 4, *(v["batch_stats"] for *_, v in each))
    got, want = (jax.tree.leaves(t)[0] for t in (after["batch_stats"], moved))
    assert got.shape == (3, 3)
    np.testing.assert_allclose(got, want, 1e-4, 1e-6)


@each_form
@pytest.mark.parametrize("told", [False, True])
def test_what_does_not_come_out_of_a_scan_is_refused(form, told):
    if form is accumulate and told:
        pytest.skip("it does")
    model = Scanned(told)
    variables = model.init(jax.random.key(0), X)
    message = "use accumulate" if told else r"variable_axes=\{'bn_jax.surgery': 0\}"
    with pytest.raises(ValueError, match=message):
        form(model, variables, mean_output, parts((X, X), 4))


@each_form
def test_auxiliary_outputs(form):
    model, variables, call = linen(bn_jax.linen.BatchNorm)
    batch = parts((X, T), 4)

    def with_aux(output, targets):
        return mean_square(output, targets), {"output": output, "targets": targets}

    want = jitted(form, model, **call)(variables, batch)
    step = jax.jit(lambda v, b: form(model, v, with_aux, b, has_aux=True, **call))
    (value, aux), *others = step(variables, batch)
    assert_same_step((value, *others), want)
    np.testing.assert_array_equal(aux["targets"], batch[1])
    assert aux["output"].shape[:2] == batch[0].shape[:2]
    values = [mean_square(o, t) for o, t in zip(aux["output"], batch[1], strict=True)]
    np.testing.assert_allclose(value, np.mean(values), 1e-5)


class NamesAxes(nn.Module):
    """Collectives in the layers, and one of the model's own, before them."""

    axis_name: str | None = "replicas"

    @nn.compact
    def __call__(self, x):
        if self.axis_name is not None:
            x = x + jax.lax.pmean(jnp.mean(x), self.axis_name)
        else:
            x = x + jnp.mean(x)
        x = nn.Dense(4)(x)
        return bn_jax.linen.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)


@each_form
def test_an_axis_that_nobody_has_bound(form):
    model = NamesAxes()
    alone = NamesAxes(None)
    variables = alone.init(jax.random.key(0), X)
    batch = parts((X, T), 4)
    want = jitted(form, alone, mean_output)(variables, batch)
    assert_same_step(jitted(form, model, mean_output)(variables, batch), want)


def test_running_statistics_in_the_middle_of_training_are_refused():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = bn_jax.linen.BatchNorm()
            x = norm(x, use_running_average=False)
            return norm(2 * x, use_running_average=True)

    model = Twice()
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="in training and then with its running statistics"):
        accumulate_exactly(model, variables, mean_output, parts((X, T), 4))


@each_form
def test_a_mode_by_position(form):
    model, variables, call = linen(bn_jax.linen.BatchNorm)
    x, t = parts((X, T), 4)
    got = form(model, variables, mean_square, ((x, True), t))
    assert_same_step(got, form(model, variables, mean_square, (x, t), **call))


@each_form
def test_different_numbers_of_micro_batches(form):
    model, variables, call = linen(bn_jax.linen.BatchNorm)
    with pytest.raises(ValueError, match="leading axis sizes"):
        form(model, variables, mean_square, (parts(X, 4), parts(T, 3)), **call)
