"""The layers for `flax.nnx`: they own the variables, `bn_jax.core` has the formulas."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn import dtypes
from jax.typing import DTypeLike

from bn_jax.core.arrays import as_axes, check_features
from bn_jax.core.batch_norm import batch_norm
from bn_jax.core.ghost import check_groups, ghost_batch_norm
from bn_jax.core.layer import (
    check_call,
    check_settings,
    counts_updates,
    dtype_of_stats,
    forward,
    initial_stats,
)
from bn_jax.core.presets import preset
from bn_jax.core.renorm import PAPER_D_MAX, PAPER_R_MAX, Bound, batch_renorm, check_bounds
from bn_jax.core.running import BatchStats, ema
from bn_jax.core.sync import Groups

Initializer = jax.nn.initializers.Initializer


class BatchNorm(nnx.Module):
    """Drop-in for `flax.nnx.BatchNorm`: same arguments, same variables, same numbers.

    What is right here and wrong there is what `bn_jax.linen.BatchNorm` lists; besides,
    with dtype=bfloat16 statistics stay, and are used, in float32.

    Variables: `nnx.Param` scale, bias `[num_features]` of `param_dtype` (None without);
    `nnx.BatchStat` mean, var `[num_features]` of `stats_dtype`, and count, the number of
    updates, where the estimator or a schedule wants it.

    Args:
      num_features: size of the feature axis; a tuple of sizes for several axes.
      use_running_average: normalise with the running statistics and leave them, or (False)
        with those of the batch, and update them. `train()` and `eval()` set it.
      use_fast_variance, promote_dtype: accepted and ignored: the variance is always the
        stable one, and statistics are never in half precision.
      dtype: of the result; by default what input and parameters promote to (the statistics,
        which make Flax's float32, have no part in it).
      stats_dtype: of the running mean; by default float32, or float64, complex64 or
        complex128 where `param_dtype` is. Complex input needs a complex one.
      rngs: for the initialisers; metadata for the variables.
      others: as in `bn_jax.linen.BatchNorm`.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | Callable[[jax.Array], jax.Array] | None = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = jax.nn.initializers.zeros,
        scale_init: Initializer = jax.nn.initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: Groups = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        estimator: Callable[..., BatchStats] = ema,
        unbiased: bool = False,
        skip_nonfinite: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        allow_single: bool = False,
        stats_dtype: DTypeLike | None = None,
    ):
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = as_axes(axis)
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias, self.use_scale = use_bias, use_scale
        self.axis_name, self.axis_index_groups = axis_name, axis_index_groups
        self.use_fast_variance, self.promote_dtype = use_fast_variance, promote_dtype
        self.estimator, self.unbiased = estimator, unbiased
        self.skip_nonfinite = skip_nonfinite
        self.activation = activation
        self.allow_single = allow_single
        check_settings(self)

        several = isinstance(num_features, Sequence)
        features = tuple(num_features) if several else (operator.index(num_features),)
        if stats_dtype is None:
            of_complex = jnp.issubdtype(param_dtype, jnp.complexfloating)
            stats_dtype = dtype_of_stats(param_dtype, of_complex=of_complex)
        start = initial_stats(self, features, stats_dtype)
        self.mean, self.var = nnx.BatchStat(start.mean), nnx.BatchStat(start.var)
        self.count = nnx.data(None)
        if self._counts_updates():
            self.count = nnx.BatchStat(start.count)

        def parameter(wanted, init, metadata):
            if not wanted:
                return nnx.data(None)
            return nnx.Param(init(rngs.params(), features, param_dtype), **metadata)

        self.scale = parameter(use_scale, scale_init, scale_metadata)
        self.bias = parameter(use_bias, bias_init, bias_metadata)

    @classmethod
    def like(cls, framework: str, num_features: int | Sequence[int], **fields: Any):
        """A layer that computes what `framework`'s does: see `bn_jax.linen.BatchNorm.like`."""
        return cls(num_features, **preset(framework, fields))

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
        update_stats: bool = True,
    ) -> jax.Array:
        """Normalises x; arguments, result and errors as in `bn_jax.linen.BatchNorm`.

        use_running_average in the call precedes the attribute.
        """
        error_msg = "use_running_average is given neither to BatchNorm nor in its call"
        modes = use_running_average, self.use_running_average
        use_running_average = first_from(*modes, error_msg=error_msg)
        x = jnp.asarray(x)
        variables = {"mean": self.mean, "var": self.var}
        if self.count is not None:
            variables["count"] = self.count
        stats = BatchStats(
            **({"count": jnp.int32(0)} | {name: v[...] for name, v in variables.items()})
        )
        check_features(x, self.axis, mean=stats.mean, var=stats.var)
        check_call(self, scale=scale, bias=bias)
        scale = scale if self.scale is None else self.scale[...]
        bias = bias if self.bias is None else self.bias[...]
        arguments = self._function(stats), x, stats, scale, bias
        y, stats = forward(self, *arguments, use_running_average=use_running_average, mask=mask)
        if update_stats and not use_running_average:
            for name, v in variables.items():
                v.set_value(getattr(stats, name))
        return y

    def set_view(self, use_running_average: bool | None = None):
        """What `nnx.view` calls.

        Args:
          use_running_average: of the view, if given.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _function(self, stats: BatchStats) -> Callable[..., Any]:
        """What normalises a batch, given the running statistics before it."""
        return batch_norm

    def _counts_updates(self) -> bool:
        return counts_updates(self)


class GhostBatchNorm(BatchNorm):
    """`BatchNorm` over groups of examples: see `bn_jax.linen.GhostBatchNorm`.

    Args:
      group_size, strided: as in `bn_jax.ghost_batch_norm`.
      others: as in `BatchNorm`; there are no axis_index_groups.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        group_size: int = 32,
        strided: bool = False,
        **fields: Any,
    ):
        check_groups(group_size, strided)
        self.group_size, self.strided = group_size, strided
        super().__init__(num_features, **fields)

    def _function(self, stats):
        return functools.partial(
            ghost_batch_norm, group_size=self.group_size, strided=self.strided
        )


class BatchRenorm(BatchNorm):
    """`BatchNorm` corrected towards its running statistics: `bn_jax.linen.BatchRenorm`.

    Args:
      r_max, d_max: bounds of the correction: numbers, or schedules of the number of updates.
      others: as in `BatchNorm`.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        r_max: Bound = PAPER_R_MAX,
        d_max: Bound = PAPER_D_MAX,
        **fields: Any,
    ):
        check_bounds(r_max, d_max)
        self.r_max, self.d_max = r_max, d_max
        super().__init__(num_features, **fields)

    def _function(self, stats):
        return functools.partial(batch_renorm, stats=stats, r_max=self.r_max, d_max=self.d_max)

    def _counts_updates(self):
        return True
