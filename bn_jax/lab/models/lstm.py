"""An LSTM that reads an image as a sequence, batch-normalised or not."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList

from bn_jax.lab.models.norms import ACTIVATIONS, Norm, normalized

READS = ("rows", "pixels")
LSTM_PLACES = ("output", "recurrent")
ORTHOGONAL = nn.initializers.orthogonal()


class LSTM(nn.Module):
    """Reads an image in T steps; the last hidden state goes to a dense layer.

    `LSTM(32, 10, norm=BatchNorm)` is LSTM, BN, Dense. `LSTM(100, 10, norm=BatchNorm,
    places=("recurrent",), read="pixels")` is the network of Cooijmans et al. 2016, "Recurrent
    Batch Normalization", whose step is `LSTMStep`. Running statistics in the recurrence are
    `[T, ...]`: every step has its own, over the examples; scales are common to all steps.

    As in the paper kernels start orthogonal, but for the identity in `LSTMStep`, and the bias
    of the forget gate at 1. The states before the first step are 0; there they are learnt.

    Attributes:
      features: width of the LSTM.
      num_outputs: width of the output layer, which is linear and never normalised.
      norm: layer class or partial of one, or None; in the recurrence one that has the fields
        use_bias and scale_init.
      places: where the norm goes: any of `output` (the last hidden state) and `recurrent`.
      initial_scale: of the norms in the recurrence (.1 in the paper: gamma).
      read: `rows`: a step is a row of the image, T = height; `pixels`: T = height * width.
      permutation_seed: of a permutation of the pixels, before the image is read; or None.
      activation: key of `ACTIVATIONS`, in place of the two tanh of a step; gates are sigmoids.
      dropout: rate on what goes to the output layer.
      noise: standard deviation of the first hidden state in training, from the rng `dropout`.
        Where all images begin alike, as MNIST's do, the first steps have variance 0, and
        each multiplies the gradient by up to initial_scale^2 / epsilon. The paper has noise
        for that (section 5.1; .1 in the authors' code). Black should be 0 besides: of another
        constant the running mean comes late, and evaluation sees 1 / sqrt(epsilon) times that.
    """

    features: int
    num_outputs: int
    norm: Norm | None = None
    places: tuple[str, ...] = ("output",)
    initial_scale: float = 0.1
    read: str = "rows"
    permutation_seed: int | None = None
    activation: str = "tanh"
    dropout: float = 0.0
    noise: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Images `[n, height, width, channels]` to outputs `[n, num_outputs]`.

        The mask is as in `MLP`.

        Raises:
          ValueError: x is of another rank, or `read` or one of `places` is unknown.
        """
        self._check(x)
        kernel = functools.partial(nn.Dense, use_bias=False, kernel_init=ORTHOGONAL)
        x = kernel(4 * self.features, name="input")(self._sequence(x))
        steps = nn.scan(
            LSTMStep,
            variable_broadcast="params",
            variable_axes={DenyList("params"): 0},
            split_rngs={"params": False},
            in_axes=(0, nn.broadcast),  # type: ignore[reportArgumentType]  # Flax says int
        )(
            self.features,
            self.norm if "recurrent" in self.places else None,
            self.initial_scale,
            self.activation,
            train,
            name="steps",
        )
        h = jnp.zeros((x.shape[1], self.features), x.dtype)
        if train and self.noise:
            h += self.noise * jax.random.normal(self.make_rng("dropout"), h.shape, h.dtype)
        (h, _), _ = steps((h, jnp.zeros_like(h)), x, mask)
        h = normalized(self.norm, h, train, mask) if "output" in self.places else h
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return nn.Dense(self.num_outputs, kernel_init=ORTHOGONAL, name="output")(h)

    @nn.nowrap
    def _check(self, x):
        if x.ndim != 4:
            raise ValueError(
                f"an LSTM reads images [n, height, width, channels], not inputs of {x.shape}"
            )
        if self.read not in READS:
            raise ValueError(f"read={self.read!r}: choose from {', '.join(READS)}")
        for place in self.places:
            if place not in LSTM_PLACES:
                raise ValueError(f"place {place!r}: choose from {', '.join(LSTM_PLACES)}")

    @nn.nowrap
    def _sequence(self, x):
        """`[T, n, inputs]`."""
        n, height, width, channels = x.shape
        if self.permutation_seed is not None:
            # Under vmap over seeds too: not drawn from a key of the run.
            with jax.ensure_compile_time_eval():
                key = jax.random.key(self.permutation_seed)
                order = jax.random.permutation(key, height * width)
            x = x.reshape(n, height * width, channels)[:, order]
        steps = height if self.read == "rows" else height * width
        return x.reshape(n, steps, -1).swapaxes(0, 1)


class LSTMStep(nn.Module):
    """One step of a batch-normalised LSTM (Cooijmans et al. 2016, equations 6 to 8).

        f, i, o, g = BN(W h; scale_h) + BN(x; scale_x) + b
        c' = sigmoid(f) c + sigmoid(i) tanh(g)
        h' = sigmoid(o) tanh(BN(c'; scale_c, bias_c))

    h' goes through `perturb("hidden", h')`, whose gradient is that of the hidden state. W
    starts as the identity for g and orthogonal for the gates, as in the authors' code.

    Attributes:
      features, norm, initial_scale, activation: as in `LSTM`; without norm BN is the identity.
      train: whether a BatchNorm uses, and updates, the statistics of the batch.
    """

    features: int
    norm: Norm | None
    initial_scale: float
    activation: str
    train: bool

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], x: jax.Array, mask: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """One step further.

        Args:
          carry: h and c, `[n, features]` each.
          x: `[n, 4 features]`; W_x x_t in the paper.
          mask: as in `MLP`.
        """
        h, c = carry
        act, norm = ACTIVATIONS[self.activation], functools.partial(self._norm, mask)
        kernel = nn.Dense(
            4 * self.features, use_bias=False, kernel_init=_recurrent, name="recurrent"
        )
        bias = self.param("bias", _forget, (1, 4 * self.features))
        gates = norm("hidden_norm", kernel(h), use_bias=False)
        gates = gates + norm("input_norm", x, use_bias=False) + bias
        f, i, o, g = jnp.split(gates, 4, axis=-1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * act(g)
        h = nn.sigmoid(o) * act(norm("cell_norm", c))
        # Zeros made by init would be of init's batch.
        h = h if self.is_initializing() else self.perturb("hidden", h)
        return (h, c), None

    @nn.nowrap
    def _norm(self, mask, name, x, **fields):
        if self.norm is None:
            return x
        scale = nn.initializers.constant(self.initial_scale)
        norm = functools.partial(self.norm, name=name, scale_init=scale, **fields)
        return normalized(norm, x, self.train, mask)


def _recurrent(key, shape, dtype=jnp.float32):
    n, _ = shape
    gates = ORTHOGONAL(key, (n, 3 * n), dtype)
    return jnp.concatenate([gates, jnp.eye(n, dtype=dtype)], axis=1)


def _forget(key, shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype).at[:, : shape[1] // 4].set(1)
