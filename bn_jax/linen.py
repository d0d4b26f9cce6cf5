"""The layers for `flax.linen`: they own the variables, `bn_jax.core` has the formulas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import merge_param
from jax.typing import DTypeLike

from bn_jax.core.arrays import as_axes, check_features, feature_shape
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


class BatchNorm(nn.Module):
    """Drop-in for `flax.linen.BatchNorm`: same fields, same variables, same numbers.

    Where Flax's numbers are wrong these are right: statistics are weighted by how many
    elements each replica's mask leaves, the variance is stable at any mean, running
    statistics keep their dtype; and a mask or statistics of the wrong shape, missing
    statistics, and a single element per feature are refused. Integer input is refused too.

    Variables: `params` scale, bias `[features]` of `param_dtype`; `batch_stats` mean, var
    `[features]` of float32, or of float64 where `param_dtype` is (a complex mean of complex
    input), and count, the number of updates, where the estimator or a schedule wants it.
    Statistics that are loaded in another dtype keep it. Apply with `mutable=["batch_stats"]`
    in training.

    Attributes:
      use_running_average: normalise with `batch_stats` and leave them, or (False) with the
        statistics of the batch, and update them. Here or in the call.
      axis: the feature axis, or axes.
      momentum: weight of the old value in the running average, from 0 to 1; may be traced;
        or a schedule of the number of updates; or None with `cumulative_mean`, which has none.
      epsilon: added to the variance; at least 0.
      dtype: of the result; by default what input and parameters promote to.
      param_dtype: of scale and bias.
      use_bias, use_scale: whether there is a bias, a scale.
      bias_init, scale_init: their initialisers.
      axis_name, axis_index_groups: replicas to share statistics with, as in
        `bn_jax.moments`. Not looked at while the module initialises.
      use_fast_variance: accepted and ignored: the variance is always the stable one.
      force_float32_reductions: accepted and ignored: statistics are never in half precision.
      estimator: `bn_jax.ema`, `debiased_ema` or `cumulative_mean`, or a function like them.
      unbiased: average the unbiased variance of the batches, `core.running.unbiased_var`.
      skip_nonfinite: leave the statistics of a feature as they are where those of the
        batch are not finite.
      activation: applied to the result; nothing is kept for its derivative.
      allow_single: go on with one element per feature (initialisation always does).
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | Callable[[jax.Array], jax.Array] | None = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: str | None = None
    axis_index_groups: Groups = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    estimator: Callable[..., BatchStats] = ema
    unbiased: bool = False
    skip_nonfinite: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    allow_single: bool = False

    def __post_init__(self):
        check_settings(self)
        object.__setattr__(self, "axis", as_axes(self.axis))
        super().__post_init__()

    @classmethod
    def like(cls, framework: str, **fields: Any) -> BatchNorm:
        """A layer that computes what `framework`'s does, with `fields` beside its settings.

        Args:
          framework: flax, torch, keras, haiku, equinox or paper; `bn_jax.core.presets` has
            what each means.
          **fields: of this class.

        Raises:
          ValueError: another framework.
        """
        return cls(**preset(framework, fields))

    @nn.compact
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
        """Normalises x.

        Args:
          x: floating-point or complex input.
          use_running_average: see the attribute; in one of the two places.
          mask: bool or weights of x's rank, broadcastable to it: what counts in the
            statistics of the batch. Not looked at with running statistics.
          scale, bias: in place of parameters (use_scale=False, use_bias=False):
            `[features]`, or of x's rank and broadcastable to it, so that every example can
            have its own.
          update_stats: whether the running statistics move, if the batch's are in use.

        Returns:
          The normalised input, of x's shape.

        Raises:
          TypeError: x is not floating point.
          ValueError: statistics or mask whose shape does not fit x, no `batch_stats` among
            the variables, one element per feature, or a scale or bias from two places.
        """
        use_running_average = merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = jnp.asarray(x)
        variables = self._batch_stats(x)
        stats = BatchStats(**({"count": jnp.int32(0)} | {n: v.value for n, v in variables}))
        check_call(self, scale=scale, bias=bias)
        scale = self._parameter("scale", self.scale_init, x) if self.use_scale else scale
        bias = self._parameter("bias", self.bias_init, x) if self.use_bias else bias
        arguments = self._function(stats), x, stats, scale, bias
        mode = {"use_running_average": use_running_average, "mask": mask}
        y, stats = forward(self, *arguments, **mode, initializing=self.is_initializing())
        if update_stats and not use_running_average and not self.is_initializing():
            for name, v in variables:
                v.value = getattr(stats, name)
        return y

    @nn.nowrap
    def _function(self, stats: BatchStats) -> Callable[..., Any]:
        """What normalises a batch, given the running statistics before it."""
        return batch_norm

    @nn.nowrap
    def _counts_updates(self) -> bool:
        return counts_updates(self)

    @nn.nowrap
    def _parameter(self, name, init, x):
        return self.param(name, init, feature_shape(x.shape, self.axis), self.param_dtype)

    @nn.nowrap
    def _batch_stats(self, x):
        names = ("mean", "var", "count") if self._counts_updates() else ("mean", "var")
        missing = [n for n in names if not self.has_variable("batch_stats", n)]
        if missing and not self.is_initializing():
            raise ValueError(
                f"no {' and '.join(missing)} in batch_stats for "
                f"{'/'.join(self.path) or 'this BatchNorm'}: pass the collection that init "
                "returned, with the parameters"
            )
        dtype = dtype_of_stats(self.param_dtype, of_complex=jnp.iscomplexobj(x))
        start = initial_stats(self, feature_shape(x.shape, self.axis), dtype)
        variables = [
            (n, self.variable("batch_stats", n, lambda n=n: getattr(start, n))) for n in names
        ]
        values = {n: v.value for n, v in variables}
        check_features(x, self.axis, mean=values["mean"], var=values["var"])
        return variables


class GhostBatchNorm(BatchNorm):
    """`BatchNorm` over groups of examples, as `bn_jax.ghost_batch_norm` has it.

    The running statistics take the groups one after another, as if each were a batch.

    Attributes:
      group_size, strided: as in `bn_jax.ghost_batch_norm`.
      others: as in `BatchNorm`; there are no axis_index_groups.
    """

    group_size: int = 32
    strided: bool = False

    def __post_init__(self):
        check_groups(self.group_size, self.strided)
        super().__post_init__()

    @nn.nowrap
    def _function(self, stats):
        return functools.partial(
            ghost_batch_norm, group_size=self.group_size, strided=self.strided
        )


class BatchRenorm(BatchNorm):
    """`BatchNorm` that is corrected towards its running statistics: `bn_jax.batch_renorm`.

    `batch_stats` has a count always. With the defaults, those of the paper, the first 5,000
    updates are plain batch normalisation.

    Attributes:
      r_max, d_max: bounds of the correction: numbers, or schedules of the number of updates.
      others: as in `BatchNorm`.
    """

    r_max: Bound = PAPER_R_MAX
    d_max: Bound = PAPER_D_MAX

    def __post_init__(self):
        check_bounds(self.r_max, self.d_max)
        super().__post_init__()

    @nn.nowrap
    def _function(self, stats):
        return functools.partial(batch_renorm, stats=stats, r_max=self.r_max, d_max=self.d_max)

    @nn.nowrap
    def _counts_updates(self):
        return True
