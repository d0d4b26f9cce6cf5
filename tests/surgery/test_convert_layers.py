"""Single layers beside the real ones: in training, after more of it, and in inference."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import assert_close, make_linen, make_nnx

import bn_jax.linen
import bn_jax.nnx
from bn_jax import cumulative_mean, debiased_ema
from bn_jax.core.presets import PRESETS, equinox_ema
from bn_jax.surgery import convert

FEATURES = 5


class Torch:
    def __init__(self, values=None, **settings):
        self.torch = pytest.importorskip("torch")
        self.layer = self.torch.nn.BatchNorm2d(**{"num_features": FEATURES} | settings)
        if values is not None:
            state = {name: self.torch.tensor(v) for name, v in values.items()}
            self.layer.load_state_dict(state)
        elif self.layer.affine:
            randomise(self.layer.weight.data.numpy(), self.layer.bias.data.numpy())

    def __call__(self, x, train=True):
        y = self.layer.train(train)(self.torch.tensor(np.moveaxis(x, -1, 1)))
        return np.moveaxis(y.detach().numpy(), 1, -1)

    def to_ours(self):
        return convert.layer_from_torch(self.layer)

    back = staticmethod(convert.layer_to_torch)


class Keras:
    def __init__(self, values=None, **settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KERAS_BACKEND", "jax")  # read when Keras is first imported
            keras = pytest.importorskip("keras")
        self.layer = keras.layers.BatchNormalization(**settings)
        self.layer.build((None, 4, 3, FEATURES))
        if values is None:
            values = self.values()
            randomise(*values[:-2])
        self.layer.set_weights(values)

    def __call__(self, x, train=True):
        return np.asarray(self.layer(x, training=train))

    def to_ours(self):
        return convert.layer_from_keras(self.layer)

    def values(self):
        return [np.array(v.value) for v in self.layer.weights]

    back = staticmethod(convert.layer_to_keras)


class Haiku:
    def __init__(self, values=None, **settings):
        hk = pytest.importorskip("haiku")
        created = {"create_scale": True, "create_offset": True}
        self.settings = created | {"decay_rate": 0.9, "eps": 1e-3} | settings

        def f(x, train):
            return hk.BatchNorm(**self.settings)(x, is_training=train)

        self.f = hk.transform_with_state(f)
        self.params, self.state = values or self.f.init(None, batches()[0], True)
        if values is None:
            arrays = [np.array(v) for v in jax.tree.leaves(self.params)]
            randomise(*arrays)
            self.params = jax.tree.unflatten(jax.tree.structure(self.params), arrays)

    def __call__(self, x, train=True):
        y, self.state = self.f.apply(self.params, self.state, None, x, train)
        return y

    def to_ours(self):
        given = {n: v for n, v in self.settings.items() if not n.startswith("create_")}
        return convert.layer_from_haiku((self.params, self.state), **given)

    def values(self):
        return self.params, self.state

    @staticmethod
    def back(layer, variables):
        return convert.layer_to_haiku(layer, variables, ndim=4)


class Equinox:
    def __init__(self, values=None, **settings):
        self.eqx = pytest.importorskip("equinox")
        settings = {"input_size": FEATURES, "mode": "batch"} | settings
        make = self.eqx.nn.make_with_state(self.eqx.nn.BatchNorm)
        self.layer, self.state = make(axis_name="batch", **settings)
        affine = self.layer.channelwise_affine
        if values is None:
            values = {"weight": np.ones(FEATURES, "f"), "bias": np.zeros(FEATURES, "f")}
            randomise(*values.values())
        for name in ("weight", "bias") if affine else ():
            where = functools.partial(lambda name, layer: getattr(layer, name), name)
            self.layer = self.eqx.tree_at(where, self.layer, jnp.asarray(values[name]))
        for name in values.keys() & {"batch_counter", "batch_state_index"}:
            self.state = self.state.set(getattr(self.layer, name), values[name])

    def __call__(self, x, train=True):
        one = functools.partial(self.layer, inference=not train)
        mapped = jax.vmap(one, (0, None), (0, None), axis_name="batch")
        y, self.state = mapped(jnp.moveaxis(x, -1, 1), self.state)
        return jnp.moveaxis(y, 1, -1)

    def to_ours(self):
        return convert.layer_from_equinox((self.layer, self.state))

    back = staticmethod(convert.layer_to_equinox)


class FlaxLinen:
    def __init__(self, values=None, **settings):
        self.layer = nn.BatchNorm(use_fast_variance=False, **settings)
        x = jnp.ones((2, 4, 3, FEATURES))
        self.variables = values or self.layer.init(jax.random.key(0), x, True)
        if values is None and "params" in self.variables:
            arrays = [np.array(v) for v in self.variables["params"].values()]
            randomise(*arrays)
            params = dict(zip(self.variables["params"], map(jnp.asarray, arrays), strict=True))
            self.variables = {**self.variables, "params": params}

    def __call__(self, x, train=True):
        y, new = self.layer.apply(self.variables, x, not train, mutable=["batch_stats"])
        self.variables = {**self.variables, **new}
        return y

    def to_ours(self):
        return convert.layer_from_flax((self.layer, self.variables))

    back = staticmethod(convert.layer_to_flax)


PEERS = {
    "torch": Torch,
    "torch momentum=.3": functools.partial(Torch, momentum=0.3, eps=0.01),
    "torch momentum=None": functools.partial(Torch, momentum=None),
    "torch affine=False": functools.partial(Torch, affine=False),
    "keras": Keras,
    "keras center=False": functools.partial(Keras, center=False, momentum=0.7, epsilon=1e-2),
    "keras scale=False": functools.partial(Keras, scale=False, axis=3),
    "haiku": Haiku,
    "haiku no offset": functools.partial(Haiku, create_offset=False, decay_rate=0.5),
    "equinox": functools.partial(Equinox, momentum=0.9),
    "equinox no affine": functools.partial(Equinox, channelwise_affine=False, momentum=0.7),
    "flax linen": FlaxLinen,
    "flax linen no bias": functools.partial(FlaxLinen, use_bias=False, momentum=0.6),
}
every_peer = pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
HOMES = {"linen": make_linen, "nnx": functools.partial(make_nnx, features=FEATURES)}
every_home = pytest.mark.parametrize("home", HOMES.values(), ids=HOMES)


def randomise(*arrays):
    """In place."""
    rng = np.random.default_rng(2)
    for v in arrays:
        v[...] += rng.normal(size=v.shape)


def batches():
    rng = np.random.default_rng(1)
    loc, std = rng.normal(size=FEATURES), [0.5, 0.7, 1, 1.4, 2]
    return [np.float32(std * (rng.normal(size=(n, 4, 3, FEATURES)) + loc)) for n in [9, 6] * 3]


def flat(variables):
    return variables.get("params", {}) | variables["batch_stats"]


def of_ours(layer, variables):
    """What `layer_to_...` takes, of an adapter and its flat variables."""
    if hasattr(layer, "graph"):
        state = jax.tree.map(lambda v: v, layer.state)
        nnx.replace_by_pure_dict(state, variables)
        return layer.graph, state
    params = {n: v for n, v in variables.items() if n in ("scale", "bias")}
    stats = {n: v for n, v in variables.items() if n not in params}
    return layer.layer, {"params": params, "batch_stats": stats}


@every_peer
@every_home
def test_both_ways(peer, home):
    """There two steps, here two steps, there two steps: as all of them there. Exactly back."""
    xs, alone, before = batches(), peer(), peer()
    want = [alone(x) for x in xs]
    got = [before(x) for x in xs[:2]]
    fields, variables = before.to_ours()
    layer, variables = home(**fields), flat(variables)
    for x in xs[2:4]:
        assert_close(layer.apply(variables, x, train=False)[0], before(x, train=False), 1e-6)
        y, variables = layer.apply(variables, x)
        before(x)
        got.append(y)
    settings, values = before.back(*of_ours(layer, variables))
    after = type(before)(values, **settings)
    fields_again, variables_again = after.to_ours()
    assert fields_again == fields
    # A hidden average is rounded otherwise than what is read of it.
    tolerance = 3e-7 if type(before) in (Haiku, Equinox) else 0
    assert_close(flat(variables_again), variables, tolerance)
    got += [after(x) for x in xs[4:]]
    assert_close(got, want, 1e-6)
    assert_close(after(xs[0], train=False), alone(xs[0], train=False), 1e-6)


def test_flax_of_nnx():
    x, there = batches()[0], nnx.BatchNorm(FEATURES, epsilon=1e-3, rngs=nnx.Rngs(0))
    there.bias.set_value(jnp.arange(FEATURES, dtype="f"))
    there(x)
    fields, variables = convert.layer_from_flax(nnx.split(there))
    got = make_linen(**fields).apply(flat(variables), x, train=False)[0]
    assert_close(got, there(x, use_running_average=True), 1e-6)
    _, back = convert.layer_to_flax(bn_jax.linen.BatchNorm(**fields), variables)
    assert_close(flat(back), nnx.to_pure_dict(nnx.state(there)), 0)


def test_what_is_converted_is_a_copy():
    """torch trains in place, in the memory that NumPy shows."""
    there = Torch()
    _, variables = there.to_ours()
    before = jax.tree.map(np.array, variables)
    there(batches()[0])
    there.layer.weight.data += 1
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    _, values = convert.layer_to_torch(bn_jax.linen.BatchNorm.like("torch"), variables)
    for v in values.values():
        v[...] = 7
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.parametrize("channels_first", [False, True])
def test_haikus_settings(channels_first):
    last = {"cross_replica_axis": "i", "data_format": "NHWC"}
    settings = {"data_format": "NCHW"} if channels_first else last
    there = Haiku(decay_rate=0.9)
    fields, variables = convert.layer_from_haiku(there.values(), decay_rate=0.9, **settings)
    assert fields.get("axis_name") == settings.get("cross_replica_axis")
    assert fields.get("axis", -1) == (1 if channels_first else -1)
    again, (params, _) = convert.layer_to_haiku(
        bn_jax.linen.BatchNorm(**fields), variables, ndim=4
    )
    assert again.get("cross_replica_axis") == settings.get("cross_replica_axis")
    shape = (1, FEATURES, 1, 1) if channels_first else (1, 1, 1, FEATURES)
    assert params["batch_norm"]["scale"].shape == shape


def ours(framework="torch", **fields):
    layer = bn_jax.linen.BatchNorm(**PRESETS[framework] | {"momentum": 0.9} | fields)
    shape = (2, 4, 3, FEATURES)
    return layer, layer.init(jax.random.key(0), jnp.ones(shape), use_running_average=True)


@pytest.mark.parametrize(
    ("framework", "fields", "match"),
    [
        ("torch", {"activation": nn.relu}, "torch's BatchNorm has no activation=relu.*=None"),
        ("torch", {"skip_nonfinite": True}, "skip_nonfinite=True.*skip_nonfinite=False"),
        ("torch", {"dtype": jnp.bfloat16}, "no dtype=bfloat16"),
        ("torch", {"axis_name": "i"}, "no axis_name=i"),
        ("torch", {"estimator": debiased_ema}, "=debiased_ema.*ema or cumulative_mean"),
        ("torch", {"unbiased": False}, "unbiased=False.*unbiased=True"),
        ("torch", {"momentum": lambda count: 0.9}, "momentum=a schedule"),
        ("torch", {"use_scale": False}, "use_scale=False.*both or none"),
        ("torch", {"axis": (2, 3)}, r"axis=\(2, 3\)"),
        ("keras", {"estimator": cumulative_mean}, "keras.*cumulative_mean.*estimator=ema"),
        ("keras", {"unbiased": True}, "unbiased=True.*unbiased=False"),
        ("haiku", {"estimator": PRESETS["torch"]["estimator"]}, "haiku.*=debiased_ema"),
        ("equinox", {"estimator": debiased_ema}, "equinox.*estimator=equinox_ema"),
        ("equinox", {"use_bias": False}, "equinox.*both or none"),
        ("flax", {"estimator": equinox_ema}, "flax.*estimator=ema"),
    ],
)  # fmt: skip
def test_what_the_other_layer_has_not(framework, fields, match):
    layer, variables = ours(framework, **fields)
    back = getattr(convert, f"layer_to_{framework}")
    back = functools.partial(back, ndim=4) if framework == "haiku" else back
    with pytest.raises(ValueError, match=match):
        back(layer, variables)


def test_counts_that_differ():
    layer, variables = ours("haiku")
    variables["batch_stats"]["count"] = jnp.arange(FEATURES)
    with pytest.raises(ValueError, match="some have 0 updates and some 4"):
        convert.layer_to_haiku(layer, variables, ndim=4)


@pytest.mark.parametrize("home", [bn_jax.linen, bn_jax.nnx, nn])
def test_only_a_batch_norm_of_bn_jax(home):
    if home is bn_jax.nnx:
        layer, variables = nnx.split(home.BatchRenorm(FEATURES, rngs=nnx.Rngs(0)))
    else:
        layer = getattr(home, "GhostBatchNorm", nn.BatchNorm)(use_running_average=True)
        variables = layer.init(jax.random.key(0), jnp.ones((2, FEATURES)))
    for back in (convert.layer_to_torch, convert.layer_to_flax):
        with pytest.raises(TypeError, match=f"{type(layer).__name__}|BatchRenorm"):
            back(layer, variables)


def torch_norm(**settings):
    return pytest.importorskip("torch").nn.BatchNorm2d(FEATURES, **settings)


def of_torch(name, *args, **settings):
    return getattr(pytest.importorskip("torch").nn, name)(*args, **settings)


def renormed():
    there = Keras()
    there.layer.renorm = True
    return there.layer


def of_equinox(**settings):
    eqx = pytest.importorskip("equinox")
    return eqx.nn.make_with_state(eqx.nn.BatchNorm)(FEATURES, **settings)


@pytest.mark.filterwarnings("ignore:.*mode=.*:UserWarning")
@pytest.mark.parametrize(
    ("framework", "make", "settings", "match"),
    [
        ("torch", lambda: torch_norm(track_running_stats=False), {}, "=True"),
        ("torch", lambda: of_torch("SyncBatchNorm", 3), {}, "SyncBatchNorm.*axis_name"),
        ("torch", lambda: of_torch("InstanceNorm2d", 3, affine=True), {}, "InstanceNorm2d"),
        ("torch", lambda: of_torch("Linear", 2, 3), {}, "not a BatchNorm, but Dense"),
        ("torch", lambda: of_torch("ReLU"), {}, "nothing that has parameters"),
        ("keras", renormed, {}, r"BatchNormalization renorm=True"),
        ("haiku", lambda: Haiku().values(), {}, "give decay_rate"),
        ("haiku", lambda: Haiku().values(), {"decay_rate": 0.9, "axis": 0}, "settings .*axis"),
        ("haiku", lambda: ({"linear": {}}, {}), {"decay_rate": 0.9}, "BatchNorm, but linear"),
        ("equinox", lambda: of_equinox(axis_name="i", mode="ema"), {}, "mode='ema'.*training"),
        ("equinox", lambda: of_equinox(axis_name=("i", "j"), mode="batch"), {}, "'i', 'j'"),
        ("flax", lambda: (nn.LayerNorm(), {"params": {}}), {}, "LayerNorm"),
    ],
)  # fmt: skip
def test_refused_layers(framework, make, settings, match):
    with pytest.raises(ValueError, match=match):
        getattr(convert, f"layer_from_{framework}")(make(), **settings)


def test_a_dtype_that_numpy_has_not():
    with pytest.raises(TypeError, match=r"weight.*BFloat16.*float\(\)"):
        convert.layer_from_torch(torch_norm().bfloat16())
