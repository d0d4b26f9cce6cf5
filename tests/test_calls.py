"""What Flax records of a layer is one call, and what it prints is what it prints of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bn_jax.linen
import bn_jax.nnx
from bn_jax.lab.models import LSTM, Airbench, Inception, ResNet18

X = jnp.arange(32.0).reshape(8, 4)
PLAIN = {"force_terminal": False, "width": 200}


class Doubled(bn_jax.linen.BatchNorm):
    @nn.compact
    def __call__(self, x, use_running_average=None):
        return 2 * super().__call__(x, use_running_average)


class BatchNorm(nn.BatchNorm):
    pass  # Flax's, under the name that a subclass of ours has


LINEN = [
    bn_jax.linen.BatchNorm,
    bn_jax.linen.GhostBatchNorm,
    bn_jax.linen.BatchRenorm,
    Doubled,
]


class Block(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        return nn.relu(self.norm(use_running_average=not train, name="norm")(nn.Dense(4)(x)))


class Net(nn.Module):
    """A block that is called twice, and one that is called once."""

    norm: type

    @nn.compact
    def __call__(self, x, train):
        block = Block(self.norm)
        return Block(self.norm)(block(block(x, train), train), train)


def recorded(norm, train):
    """The methods that an interceptor sees, and the paths of what is captured."""
    net, calls = Net(norm), []

    def spy(method, args, kwargs, context):
        calls.append((context.module.path, context.method_name))
        return method(*args, **kwargs)

    variables = net.init(jax.random.key(0), X, train)
    mutable = ["batch_stats", "intermediates"]
    with nn.intercept_methods(spy):
        _, state = net.apply(variables, X, train, mutable=mutable, capture_intermediates=True)
    return calls, jax.tree.map(jnp.shape, state["intermediates"])


@pytest.mark.parametrize("norm", LINEN)
@pytest.mark.parametrize("train", [True, False])
def test_a_layer_is_called_once(norm, train):
    if norm is Doubled:  # of a subclass Flax sees the call of the class above as well
        calls, _ = recorded(norm, train)
        assert {name for _, name in calls} == {"__call__"}
    else:
        assert recorded(norm, train) == recorded(nn.BatchNorm, train)


def table(norm, **options):
    tabulate = nn.tabulate(Net(norm), jax.random.key(0), console_kwargs=PLAIN, **options)
    return tabulate(X, train=True)


@pytest.mark.parametrize("norm", LINEN)
def test_tables_of_shared_blocks(norm):
    printed = table(norm, show_repeated=True, compute_flops=True, compute_vjp_flops=True)
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if "│" in line]
    each = 2 if norm is Doubled else 1
    assert [rows.count(f"Block_{i}/norm") for i in (0, 1)] == [2 * each, each]


@pytest.mark.parametrize("show_repeated", [True, False])
def test_a_table_is_that_of_flax(show_repeated):
    ours, theirs = (
        table(norm, show_repeated=show_repeated) for norm in (bn_jax.linen.BatchNorm, BatchNorm)
    )
    assert ours == theirs


@pytest.mark.parametrize("name", ["BatchNorm", "GhostBatchNorm", "BatchRenorm"])
def test_tables_of_nnx(name):
    layer = getattr(bn_jax.nnx, name)(4, rngs=nnx.Rngs(0))
    printed = nnx.tabulate(
        nnx.Sequential(layer, layer), X, console_kwargs=PLAIN,
        compute_flops=True, compute_vjp_flops=True,
    )  # fmt: skip
    assert printed.count(f" {name} ") == 1  # the second is the first


@pytest.mark.parametrize(
    "model",
    [ResNet18(3), Airbench(3), Inception(3, stem="small"), LSTM(4, 3)],
    ids=lambda model: type(model).__name__,
)
def test_the_models_have_no_calls_of_their_own(model):
    seen = set()

    def spy(method, args, kwargs, context):
        seen.add(context.method_name)
        return method(*args, **kwargs)

    model = model.clone(norm=bn_jax.linen.BatchNorm)
    with nn.intercept_methods(spy):
        jax.eval_shape(
            lambda x: model.init(jax.random.key(0), x, train=True), jnp.ones((4, 32, 32, 3))
        )
    assert not [name for name in seen - {"__call__"} if name.startswith("_")]
