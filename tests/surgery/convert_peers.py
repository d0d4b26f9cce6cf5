"""Networks as they are written in torch and in Flax: {name: (torch's, Flax's, inputs)}."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax.linen

torch = pytest.importorskip("torch")
T, F = torch.nn, torch.nn.functional
RNG = np.random.default_rng(0)
IMAGES = np.float32(RNG.normal(size=(3, 4, 6, 2)))
VECTORS = np.float32(RNG.normal(size=(3, 5)))


def norm(**fields):
    return bn_jax.linen.BatchNorm.like("torch", use_running_average=True, **fields)


def conv(features, size=3, stride=1, **fields):
    pads = [(size // 2, size // 2)] * 2
    return nn.Conv(features, (size, size), stride, padding=pads, **fields)


def flat(x):
    return x.reshape(len(x), -1)


class VAE(T.Module):
    def __init__(self):
        super().__init__()
        self.conv = T.Conv2d(2, 4, 3, padding=1)
        self.mu, self.logvar = T.Linear(24, 3), T.Linear(24, 3)
        self.dense = T.Linear(3, 24)
        self.norm = T.BatchNorm1d(24)
        self.up = T.ConvTranspose2d(4, 3, 2, 2)
        self.sharpen = T.Linear(3, 48)

    def forward(self, x):
        h = F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1)
        mu, logvar = self.mu(h), self.logvar(h)
        h = F.relu(self.norm(self.dense(mu))).view(-1, 4, 2, 3)
        return self.up(h), self.sharpen(logvar).view(-1, 2, 4, 6), logvar


class VAEOfFlax(nn.Module):
    """A pool before the flattening, two heads after it; images by ConvTranspose and Dense."""

    @nn.compact
    def __call__(self, x):
        h = flat(nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="conv")(x)), (2, 2), (2, 2)))
        mu, logvar = nn.Dense(3, name="mu")(h), nn.Dense(3, name="logvar")(h)
        h = nn.relu(norm(name="norm")(nn.Dense(24, name="dense")(mu))).reshape(-1, 2, 3, 4)
        y = nn.ConvTranspose(3, (2, 2), (2, 2), padding="VALID", transpose_kernel=True)(h)
        return y, nn.Dense(48, name="sharpen")(logvar).reshape(-1, 4, 6, 2), logvar


class Actor(T.Module):
    """Beside an image its vector: a Dense in between, and both concatenated."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.conv, self.other = T.Conv2d(2, 3, 3, padding=1), T.Conv2d(2, 4, 1)
        self.side, self.norm = T.Linear(5, 7), T.LayerNorm(7 * 24 + 7)
        self.body, self.policy = T.Linear(7 * 24 + 7, 24), T.Linear(24, 3)
        self.value = T.Linear(24 * 7, 1)

    def forward(self, x, v):
        images = torch.cat([F.relu(self.conv(x)), self.other(x)], 1)
        both = torch.cat([images.flatten(1), F.relu(self.side(v))][:: self.order], 1)
        h = torch.tanh(self.body(self.norm(both)))
        return {"policy": self.policy(h), "value": self.value(images.flatten(1))}


class ActorOfFlax(nn.Module):
    order: int

    @nn.compact
    def __call__(self, x, v):
        images = [nn.relu(conv(3, name="conv")(x)), conv(4, 1, name="other")(x)]
        images = jnp.concatenate(images, -1)
        side = nn.relu(nn.Dense(7, name="side")(v))
        both = jnp.concatenate([flat(images), side][:: self.order], -1)
        both = nn.LayerNorm(epsilon=1e-5, name="norm")(both)
        h = jnp.tanh(nn.Dense(24, name="body")(both))
        value = nn.DenseGeneral(1, axis=(-3, -2, -1), name="value")(images)
        return {"value": value, "policy": nn.Dense(3, name="policy")(h)}


class Block(T.Module):
    """Its layers defined in another order than that of the calls; torchvision's names."""

    def __init__(self, inputs, features, stride):
        super().__init__()
        self.bn2 = T.BatchNorm2d(features)
        self.conv2 = T.Conv2d(features, features, 3, padding=1, groups=2, bias=False)
        self.conv1 = T.Conv2d(inputs, features, 3, stride, padding=1, bias=False)
        self.bn1 = T.BatchNorm2d(features)
        self.downsample = T.Sequential(
            T.Conv2d(inputs, features, 1, stride, bias=False), T.BatchNorm2d(features)
        )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class ResNet(T.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = T.Sequential(Block(2, 4, 1), Block(4, 4, 2))
        self.fc = T.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.layer1(x).mean((2, 3)))


class BlockOfFlax(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        y = conv(self.features, stride=self.stride, use_bias=False, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(self.features, feature_group_count=2, use_bias=False, name="conv2")(y)
        y = norm(name="bn2")(y)
        x = conv(self.features, 1, self.stride, use_bias=False, name="downsample_0")(x)
        return nn.relu(y + norm(name="downsample_1")(x))


class ResNetOfFlax(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = BlockOfFlax(4, 1, name="layer1_0")(x)
        x = BlockOfFlax(4, 2, name="layer1_1")(x)
        return nn.Dense(3, name="fc")(x.mean((1, 2)))


class Own(T.Module):
    """Flattens with the channels last, as its author may."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = T.Conv2d(2, 4, 3, padding=1), T.Linear(96, 3)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))


class OwnOfFlax(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(flat(nn.relu(nn.Conv(4, (3, 3))(x))))


class Sequence(T.Module):
    """Of a rank in which the channels may be anywhere, and the output an image flattened."""

    def __init__(self):
        super().__init__()
        self.conv, self.token, self.head = T.Conv1d(5, 4, 3), T.Linear(4, 6), T.Linear(24, 3)

    def forward(self, x):
        return self.head(self.token(F.relu(self.conv(x)).mT).flatten(1))


class SequenceOfFlax(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(nn.relu(nn.Conv(4, (3,), padding="VALID")(x)))
        return nn.Dense(3)(flat(x))


SEQUENCES = np.float32(RNG.normal(size=(2, 6, 5)))
PEERS = {
    "vae": (VAE, VAEOfFlax, (IMAGES,)),
    "actor": (lambda: Actor(1), lambda: ActorOfFlax(1), (IMAGES, VECTORS)),
    "side first": (lambda: Actor(-1), lambda: ActorOfFlax(-1), (IMAGES, VECTORS)),
    "resnet": (ResNet, ResNetOfFlax, (IMAGES,)),
    "a pad before a layer": (
        lambda: T.Sequential(T.ZeroPad2d((0, 1, 0, 1)), T.Conv2d(2, 4, 3, 2, groups=2)),
        lambda: nn.Conv(4, (3, 3), (2, 2), feature_group_count=2),
        (IMAGES,),
    ),
    "channels last": (Own, OwnOfFlax, (IMAGES,)),
    "sequence": (Sequence, SequenceOfFlax, (SEQUENCES,)),
    "mlp of images": (
        lambda: T.Sequential(T.Flatten(), T.Linear(48, 3)),
        lambda: nn.Sequential([flat, nn.Dense(3)]),
        (IMAGES,),
    ),
}  # fmt: skip


def of_torch(make, seed=0):
    """In evaluation, with statistics and affine parameters of their own."""
    torch.manual_seed(seed)
    module = make().eval()
    for layer in module.modules():
        if hasattr(layer, "running_mean"):
            for v in (layer.weight, layer.running_var):
                T.init.uniform_(v, 0.5, 1.5)
            for v in (layer.bias, layer.running_mean):
                T.init.normal_(v)
    return module


def of_flax(make, *inputs, seed=0):
    model = make()
    return model, model.init(jax.random.key(seed), *inputs)


def outputs(module, *inputs):
    """In torch's layout, by leaf."""
    given = (torch.tensor(np.moveaxis(v, -1, 1) if v.ndim > 3 else v) for v in inputs)
    if isinstance(module, Sequence):
        given = (v.mT for v in given)
    with torch.no_grad():
        return jax.tree.map(lambda v: v.numpy(), module(*given))
