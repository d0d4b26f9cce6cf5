"""One training step of a small network under every transformation of JAX: the same numbers.

The wanted ones are of `equations`: the definitions, in float64 and derived by JAX.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from jax import export, lax
from jax.experimental.compilation_cache import compilation_cache
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from networks import (
    DEVICES,
    EXAMPLES,
    FEATURES,
    GROUP,
    HOMES,
    KINDS,
    SEEDS,
    assert_close,
    build,
    data,
    definitions,
    described,
    equations,
    every_home,
    every_kind,
    expected,
    loop,
    loss,
    mesh,
    scan,
    start,
)

import bn_jax
import bn_jax.linen
import bn_jax.nnx
from bn_jax.core.running import BatchStats


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Functions, Linen and NNX lower to the same programs, which are compiled for one."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


total = functools.partial(lax.psum, axis_name="batch")


def donated(build, state):
    state = jax.tree.map(jnp.copy, state)
    result = loop(jax.jit(build(), donate_argnums=0), state)
    assert all(v.is_deleted() for v in jax.tree.leaves(state))
    return result


def scanned(build, state, batches=None):
    state, y = jax.jit(functools.partial(scan, build()))(state, batches or data())
    return state, y[-1]


def scanned_in_float64(build, state):
    with jax.enable_x64(True):
        state, y = scanned(build, state, jax.tree.map(np.float64, data()))
    assert y.dtype == np.float64
    return state, y


def exported(build, state):
    pytest.importorskip("flatbuffers")  # which serialize() imports and JAX does not require
    program = export.export(jax.jit(build()))(state, *(v[0] for v in data()))
    return loop(export.deserialize(program.serialize()).call, state)


def vmap_of_examples(build, state):
    """In batches of one; `test_model_of_a_single_example` is without the axis."""
    step = build(axis_name="batch", total=total)
    step = jax.vmap(step, (None, 0, 0), (None, 0), axis_name="batch")
    state, y = loop(jax.jit(lambda state, *b: step(state, *(v[:, None] for v in b))), state)
    return state, y[:, 0]


def pmap(build, state):
    mapped = jax.pmap(build(axis_name="batch", total=total), "batch", in_axes=(None, 0, 0))

    def step(state, *batch):
        states, y = mapped(state, *(v.reshape(DEVICES, -1, v.shape[1]) for v in batch))
        states = jax.device_get(states)
        state = jax.tree.map(lambda v: v[0], states)
        for i in range(DEVICES):
            assert_close(jax.tree.map(lambda v, i=i: v[i], states), state, 0)
        return state, y.reshape(EXAMPLES, FEATURES)

    return loop(step, state)


def shard_map(step, **options):
    specs = {"in_specs": (P(), P("batch"), P("batch")), "out_specs": (P(), P("batch"))}
    return jax.jit(jax.shard_map(step, mesh=mesh(batch=DEVICES), **specs, **options))


def sharded(build, state):
    whole, parts = (NamedSharding(mesh(batch=DEVICES), spec) for spec in (P(), P("batch")))
    shardings = {"in_shardings": (whole, parts, parts), "out_shardings": (whole, parts)}
    return loop(jax.jit(build(), **shardings), state)


def sharded_explicitly(build, state):
    step = jax.jit(build())
    # Not over 4 devices: two ghost batches of an explicitly sharded axis do not split so.
    with jax.set_mesh(mesh(AxisType.Explicit, batch=EXAMPLES // GROUP)):
        return loop(lambda s, *b: step(s, *(jax.device_put(v, P("batch")) for v in b)), state)


# From a function that makes the step and the state to the last state and y.
TRANSFORMATIONS = {
    "plain": lambda build, state: loop(build(), state),
    "jit": lambda build, state: loop(jax.jit(build()), state),
    "donate_argnums": donated,
    "checkpoint": lambda build, state: loop(jax.jit(build(around=jax.checkpoint)), state),
    "remat of the layer": lambda build, state: loop(jax.jit(build(remat=True)), state),
    "scan": scanned,
    "scan over float64": scanned_in_float64,
    "export": exported,
    "vmap(axis_name)": vmap_of_examples,
    "pmap": pmap,
    "shard_map": lambda build, state: loop(shard_map(build(axis_name="batch")), state),
    "shard_map check_vma=False": lambda build, state: loop(
        shard_map(build(axis_name="batch", total=total), check_vma=False), state
    ),
    "NamedSharding": sharded,
    "explicit sharding": sharded_explicitly,
}


@every_home
@every_kind
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_same_numbers(transformation, kind, home):
    before = start(kind)
    got = TRANSFORMATIONS[transformation](functools.partial(build, home, kind), before)
    assert_close(got, jax.tree.map(lambda v: v[0], expected(kind)))
    assert described(got[0]) == described(before)


def vmap_of_vmap(build, states):
    run = jax.vmap(jax.vmap(functools.partial(scan, build()), (0, None)), (0, None))
    result = jax.jit(run)(
        jax.tree.map(lambda v: v.reshape(2, -1, *v.shape[1:]), states), data()
    )
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), result)


def vmap_of_shard_map(build, states):
    run = functools.partial(scan, build(axis_name="batch"))
    specs = {"in_specs": (P(), P(None, "batch")), "out_specs": (P(), P(None, "batch"))}
    run = jax.shard_map(run, mesh=mesh(batch=DEVICES), **specs)
    return jax.jit(jax.vmap(run, (0, None)))(states, data())


def shard_map_of_vmap(build, states):
    """Seeds over one axis of devices, examples over another."""
    run = jax.vmap(functools.partial(scan, build(axis_name="batch")), (0, None))
    specs = {"in_specs": (P("seeds"), P(None, "batch"))}
    specs["out_specs"] = P("seeds"), P("seeds", None, "batch")
    return jax.jit(jax.shard_map(run, mesh=mesh(seeds=2, batch=DEVICES), **specs))(
        states, data()
    )


@every_home
@every_kind
@pytest.mark.parametrize(
    "transformation",
    [vmap_of_vmap, vmap_of_shard_map, shard_map_of_vmap],
    ids=lambda f: f.__name__,
)
def test_same_numbers_for_all_seeds(transformation, kind, home):
    before = jax.tree.map(lambda *v: jnp.stack(v), *(start(kind, s) for s in range(SEEDS)))
    states, y = transformation(functools.partial(build, home, kind), before)
    assert_close((states, y[:, -1]), expected(kind))
    assert described(states) == described(before)


@functools.cache
def derivatives(home, kind):
    """Of the loss by parameters and examples, in both modes and their compositions."""
    params, stats = start(kind)
    if "count" in stats:
        stats["count"] += 1  # so that there is something to correct
    x, target = (np.float64(v[0]) for v in data())
    at, unravel = ravel_pytree((jax.tree.map(np.float64, params), x))
    along, norm = jnp.cos(at), HOMES[home](kind)

    def f(v):
        params, x = unravel(v)
        return loss(norm, params, stats, x, target)[0]

    def all_of_them(at):
        return {
            "linearize": jax.linearize(f, at)[1](along),
            "grad of grad": jax.grad(lambda v: jnp.sum(jnp.sin(jax.grad(f)(v))))(at),
            "grad of jvp": jax.grad(lambda v: jax.jvp(f, (v,), (along,))[1])(at),
            "hessian": jax.hessian(f)(at),
        }

    # Compiling this optimised takes twice as long.
    return jax.jit(all_of_them, compiler_options={"xla_backend_optimization_level": 0})(at)


@every_home
@every_kind
def test_derivatives(kind, home, x64):
    got = derivatives(home, kind)
    with definitions():
        want = derivatives("equations", kind)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], 1e-8, 1e-8, err_msg=name)


# Ghost batches need an axis of examples.
@every_home
@pytest.mark.parametrize("kind", ["BatchNorm", "BatchRenorm"])
def test_model_of_a_single_example(kind, home):
    (params, stats), (x, target) = start(kind), (v[0] for v in data())
    one = functools.partial(loss, HOMES[home](kind, "batch"))

    def over_examples(*arguments):
        mapped = jax.vmap(one, (None, None, 0, 0), (0, None), axis_name="batch")
        each_loss, stats = mapped(*arguments)
        return jnp.sum(each_loss), stats

    def derived(f):
        f = jax.value_and_grad(f, (0, 2), has_aux=True)
        return jax.jit(f)(params, stats, x, target)

    got = derived(over_examples)
    with definitions():
        assert_close(got, derived(functools.partial(loss, equations(kind))))


@every_kind
@pytest.mark.parametrize("home", ["linen", "nnx"])
def test_ensembles_by_the_lifted_vmap(kind, home):
    """Layers that were made, and are trained, together; each has a batch of its own."""
    x = np.random.default_rng(0).normal(1, 2, (3, EXAMPLES, FEATURES)).astype(np.float32)
    layer, fields = getattr(getattr(bn_jax, home), kind), KINDS[kind][1] | {"momentum": 0.9}

    def in_linen(x):
        mapped = {"variable_axes": {"params": 0, "batch_stats": 0}, "in_axes": (0, None)}
        members = nn.vmap(layer, **mapped, split_rngs={"params": True})(**fields)
        variables = members.init(jax.random.key(0), x, False)
        y, updated = members.apply(variables, x, False, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    def in_nnx(x):
        make = nnx.vmap(lambda rngs: layer(FEATURES, rngs=rngs, **fields))
        members = nnx.split_rngs(splits=len(x))(make)(nnx.Rngs(0))
        y = nnx.vmap(lambda member, x: member(x))(members, x)
        return y, nnx.to_pure_dict(nnx.state(members, nnx.BatchStat))

    def defined(x):
        params = {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)}
        return jax.vmap(lambda x: equations(kind)(x, params, start(kind)[1], True))(x)

    got = jax.jit(in_linen if home == "linen" else in_nnx)(x)
    with definitions():
        assert_close(got, jax.jit(defined)(x))


# The transformation of https://github.com/google/flax/issues/4760.
@pytest.mark.parametrize("kind", ["BatchNorm", "BatchRenorm"])
def test_nnx_vmap_over_the_examples_of_one_model(kind):
    params, stats = start(kind)
    fields = KINDS[kind][1] | {"momentum": 0.9, "axis_name": "batch", "rngs": nnx.Rngs(0)}
    layer, x = getattr(bn_jax.nnx, kind)(FEATURES, **fields), data()[0][0] @ params["kernel"]
    nnx.update(layer, params["norm"])
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="batch")(layer, x)
    after = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    with definitions():
        assert_close((y, after), equations(kind)(x, params["norm"], stats, True))


def test_statistics_of_micro_batches():
    x = np.random.default_rng(0).normal(3, 2, (4, 8, FEATURES)).astype(np.float32)
    mask = np.arange(8).reshape(1, 8, 1) < np.reshape([8, 3, 0, 5], (4, 1, 1))

    def add(so_far, micro_batch):
        x, mask = micro_batch
        return bn_jax.merge(so_far, bn_jax.moments(x, mask=mask)), None

    nothing = bn_jax.Moments(jnp.zeros(FEATURES), jnp.zeros(FEATURES), jnp.zeros(()))
    accumulated, _ = lax.scan(add, nothing, (x, mask))
    before = BatchStats.create((FEATURES,))
    got, seen = bn_jax.ema(before, accumulated, unbiased=True), reference.moments(x, mask=mask)
    assert_close(got.mean, reference.ema(0, seen.mean, 0.99, 16))
    assert_close(got.var, reference.ema(1, seen.var * 16 / 15, 0.99, 16))
    assert got.count == 1


def test_unsynchronised_running_statistics_merge():
    """Of replicas that see one batch each again and again, so that the truth is known."""
    x = np.random.default_rng(0).normal(size=(DEVICES, 8, FEATURES)).astype(np.float32)
    x += np.reshape([0, 5, -3, 20], (DEVICES, 1, 1))
    mask = np.arange(8).reshape(1, 8, 1) < np.reshape([8, 3, 2, 5], (DEVICES, 1, 1))
    layer = bn_jax.linen.BatchNorm(estimator=bn_jax.debiased_ema, momentum=0.9)

    @jax.pmap
    def update(variables, x, mask):
        given = {"mask": mask, "mutable": ["batch_stats"]}
        return variables | layer.apply(variables, x, False, **given)[1]

    variables = layer.init(jax.random.key(0), x[0], False)
    replicas = jax.tree.map(lambda v: jnp.stack([v] * DEVICES), variables)
    for _ in range(3):
        replicas = update(replicas, x, mask)
    stats = jax.device_get(replicas["batch_stats"])
    own = map(bn_jax.Moments, stats["mean"], stats["var"], np.float32(mask.sum((1, 2))))
    got, want = functools.reduce(bn_jax.merge, own), reference.moments(x, mask=mask)
    assert_close((got.mean, got.var), (want.mean, want.var))
