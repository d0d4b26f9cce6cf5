"""BatchNorm for `flax.linen`: it owns the variables, `bn_jax.core` has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import merge_param

from bn_jax.core.arrays import check_features, feature_shape
from bn_jax.core.batch_norm import batch_norm, normalize
from bn_jax.core.running import BatchStats, ema


class BatchNorm(nn.Module):
    """Drop-in for `flax.linen.BatchNorm`: same fields, same variables, same numbers.

    Where Flax's numbers are wrong these are right: statistics are weighted by how many
    elements each replica's mask leaves, the variance is stable at any mean, running
    statistics keep their dtype, and a mask or statistics of the wrong shape are refused.
    What Flax's can and this cannot: `jax.jvp` by itself, integer and complex input.

    Variables: `params` scale, bias `[features]` of `param_dtype`; `batch_stats` mean, var
    `[features]` of float32. Apply with `mutable=["batch_stats"]` in training.

    Attributes:
      use_running_average: normalise with `batch_stats` and leave them, or (False) with the
        statistics of the batch, and update them. Here or in the call.
      axis: the feature axis, or axes.
      momentum: weight of the old value in the running average; may be traced.
      epsilon: added to the variance.
      dtype: of the result; by default what input and parameters promote to.
      param_dtype: of scale and bias.
      use_bias, use_scale: whether there is a bias, a scale.
      bias_init, scale_init: their initialisers.
      axis_name, axis_index_groups: replicas to share statistics with, as in
        `bn_jax.moments`. Not looked at while the module initialises.
      use_fast_variance: accepted and ignored: the variance is always the stable one.
      force_float32_reductions: accepted and ignored: statistics are never in half precision.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x.

        Args:
          x: floating-point input.
          use_running_average: see the attribute; in one of the two places.
          mask: bool or weights of x's rank, broadcastable to it: what counts in the
            statistics of the batch. Not looked at with running statistics.

        Returns:
          The normalised input, of x's shape.

        Raises:
          TypeError: x is not floating point.
          ValueError: statistics or mask whose shape does not fit x, or no `batch_stats`
            among the variables.
        """
        use_running_average = merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = jnp.asarray(x)
        features = feature_shape(x.shape, self.axis)
        ra_mean, ra_var = self._batch_stats(x, features)
        scale = self._parameter("scale", self.use_scale, self.scale_init, features)
        bias = self._parameter("bias", self.use_bias, self.bias_init, features)
        if use_running_average:
            y = normalize(
                x, ra_mean.value, ra_var.value, scale, bias,
                axis=self.axis, epsilon=self.epsilon,
            )  # fmt: skip
        else:
            y, batch = batch_norm(
                x, scale, bias, axis=self.axis, epsilon=self.epsilon, mask=mask,
                allow_single=self.is_initializing(),
                # One example and no mapped axis are customary at initialisation.
                axis_name=None if self.is_initializing() else self.axis_name,
                axis_index_groups=self.axis_index_groups,
            )  # fmt: skip
            if not self.is_initializing():
                stats = BatchStats(ra_mean.value, ra_var.value, jnp.int32(0))
                stats = ema(stats, batch, momentum=self.momentum)
                ra_mean.value, ra_var.value = stats.mean, stats.var
        return y if self.dtype is None else y.astype(self.dtype)

    def _batch_stats(self, x, features):
        missing = [n for n in ("mean", "var") if not self.has_variable("batch_stats", n)]
        if missing and not self.is_initializing():
            raise ValueError(
                f"no {' and '.join(missing)} in batch_stats for "
                f"{'/'.join(self.path) or 'this BatchNorm'}: pass the collection that init "
                "returned, with the parameters"
            )
        ra_mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        ra_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        check_features(x, self.axis, mean=ra_mean.value, var=ra_var.value)
        return ra_mean, ra_var

    def _parameter(self, name, wanted, init, features):
        return self.param(name, init, features, self.param_dtype) if wanted else None
