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

    def values(self):
        return {name: v.numpy() for name, v in self.layer.state_dict().items()}

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
        self.params, self.state = values or self.f.init(
            None, jnp.ones((2, 4, 3, FEATURES)), True
        )
        if values is None:
            arrays = [np.array(v) for v in jax.tree.leaves(self.params)]
            randomise(*arrays)
            self.params = jax.tree.unflatten(jax.tree.structure(self.params), arrays)

    def __call__(self, x, train=True):
        y, self.state = self.f.apply(self.params, self.state, None, x, train)
        return y

    def to_ours(self):
        given = {
            n: v for n, v in self.settings.items() if n not in ("create_scale", "create_offset")
        }
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

    def values(self):
        indices = {n: getattr(self.layer, n) for n in ("batch_counter", "batch_state_index")}
        values = {name: self.state.get(index) for name, index in indices.items()}
        affine = {"weight": self.layer.weight, "bias": self.layer.bias}
        return (affine if self.layer.channelwise_affine else {}) | values

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

    def values(self):
        return self.variables

    back = staticmethod(convert.layer_to_flax)


class FlaxNNX:
    def __init__(self, values=None, **settings):
        self.layer = nnx.BatchNorm(
            FEATURES, use_fast_variance=False, rngs=nnx.Rngs(0), **settings
        )
        if values is None and self.layer.use_scale:
            values = {
                "params": {"scale": np.ones(FEATURES, "f"), "bias": np.ones(FEATURES, "f")}
            }
            randomise(*values["params"].values())
        for leaves in (values or {}).values():
            nnx.update(self.layer, leaves)

    def __call__(self, x, train=True):
        return self.layer(jnp.asarray(x), use_running_average=not train)

    def to_ours(self):
        return convert.layer_from_flax(nnx.split(self.layer))

    def values(self):
        return {
            name: nnx.to_pure_dict(nnx.state(self.layer, kind))
            for name, kind in (("params", nnx.Param), ("batch_stats", nnx.BatchStat))
            if nnx.to_pure_dict(nnx.state(self.layer, kind))
        }

    back = staticmethod(convert.layer_to_flax)


class Praxis:
    """Its formula: there is no package to test with."""

    def __init__(self, values=None, decay=0.999, epsilon=1e-3):
        self.settings = {"decay": decay, "epsilon": epsilon}
        zeros, ones = np.zeros(FEATURES, "f"), np.ones(FEATURES, "f")
        start = {"beta": zeros, "gamma": zeros, "moving_mean": zeros, "moving_variance": ones}
        self.arrays = {name: np.array(v) for name, v in (values or start).items()}
        if values is None:
            randomise(self.arrays["gamma"], self.arrays["beta"])

    def __call__(self, x, train=True):
        x, a, moving = np.float64(x), self.arrays, ("moving_mean", "moving_variance")
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (a[n] for n in moving)
        decay = self.settings["decay"] if train else 1
        for name, v in zip(moving, (mean, var), strict=True):
            self.arrays = self.arrays | {name: np.float32(decay * a[name] + (1 - decay) * v)}
        y = (x - mean) / np.sqrt(var + self.settings["epsilon"])
        return np.float32(y * (1 + a["gamma"]) + a["beta"])

    def to_ours(self):
        return convert.layer_from_praxis(self.arrays, **self.settings)

    def values(self):
        return self.arrays

    back = staticmethod(convert.layer_to_praxis)


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
    "flax nnx": functools.partial(FlaxNNX, epsilon=1e-3),
    "flax nnx no affine": functools.partial(FlaxNNX, use_bias=False, use_scale=False),
    "praxis": Praxis,
    "praxis decay=.9": functools.partial(Praxis, decay=0.9, epsilon=1e-5),
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
    """There two steps, here two steps, there two steps: as all of them there."""
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
    got += [after(x) for x in xs[4:]]
    assert_close(got, want, 1e-6)
    assert_close(after(xs[0], train=False), alone(xs[0], train=False), 1e-6)


@every_peer
@every_home
def test_a_round_trip_is_exact(peer, home):
    there = peer()
    for x in batches()[:3]:
        there(x)
    fields, variables = there.to_ours()
    layer = home(**fields)
    settings, values = there.back(*of_ours(layer, flat(variables)))
    again = type(there)(values, **settings)
    # A hidden average is rounded otherwise than what is read of it, and a scale than scale - 1.
    tolerance = 3e-7 if type(there) in (Haiku, Equinox, Praxis) else 0
    want, got = there.values(), again.values()
    if type(there) is Torch and fields["estimator"] is not cumulative_mean:
        want["num_batches_tracked"] = 0  # which torch does not look at
    assert_close(got, want, tolerance)
    fields_again, variables_again = again.to_ours()
    assert fields_again == fields
    assert_close(variables_again, variables, tolerance)


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
        ("praxis", {"use_bias": False}, "use_bias=True"),
        ("praxis", {"activation": nn.relu}, "praxis.*activation"),
    ],
)  # fmt: skip
def test_what_the_other_layer_has_not(framework, fields, match):
    layer, variables = ours("flax" if framework == "praxis" else framework, **fields)
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


def test_refused_torch_layers():
    torch = pytest.importorskip("torch")
    norm = functools.partial(torch.nn.BatchNorm2d, FEATURES)
    for layer, match in (
        (norm(track_running_stats=False), "track_running_stats=True"),
        (torch.nn.SyncBatchNorm(FEATURES), "SyncBatchNorm.*axis_name"),
        (torch.nn.InstanceNorm2d(FEATURES, affine=True), "InstanceNorm2d"),
        (torch.nn.Linear(2, 3), "not a BatchNorm, but Dense"),
        (torch.nn.ReLU(), "nothing that has parameters"),
    ):
        with pytest.raises(ValueError, match=match):
            convert.layer_from_torch(layer)
    with pytest.raises(TypeError, match=r"weight.*BFloat16.*float\(\)"):
        convert.layer_from_torch(norm().bfloat16())


def test_refused_keras_layers():
    there = Keras()
    there.layer.renorm = True
    with pytest.raises(ValueError, match=r"BatchNormalization renorm=True"):
        there.to_ours()


def test_refused_haiku_layers():
    values = Haiku().values()
    for settings, match in (
        ({}, "give decay_rate"),
        ({"decay_rate": 0.9, "axis": (0, 1)}, "settings decay_rate, axis"),
    ):
        with pytest.raises(ValueError, match=match):
            convert.layer_from_haiku(values, **settings)


@pytest.mark.filterwarnings("ignore:.*mode=.*:UserWarning")
def test_refused_equinox_layers():
    eqx = pytest.importorskip("equinox")
    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    for settings, match in (
        ({"axis_name": "i", "mode": "ema"}, "mode='ema'.*training"),
        ({"axis_name": ("i", "j"), "mode": "batch"}, r"axis_name=\('i', 'j'\)"),
    ):
        with pytest.raises(ValueError, match=match):
            convert.layer_from_equinox(make(FEATURES, **settings))


def test_refused_flax_and_praxis_layers():
    with pytest.raises(ValueError, match="LayerNorm"):
        convert.layer_from_flax((nn.LayerNorm(), {"params": {}}))
    values = Praxis().values()
    for arrays, settings in (({**values, "more": 1}, {}), (values, {"momentum": 0.9})):
        with pytest.raises(ValueError, match=r"more|momentum"):
            convert.layer_from_praxis(arrays, **settings)
