"""D9 and D10: what is computed after training, from many batches."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np

from bn_jax import moments
from bn_jax.core.population import pooled
from bn_jax.linen import BatchNorm
from bn_jax.surgery import fold
from experiments.defects.case import Case, each, first, normal
from experiments.defects.peers import FRAMEWORKS


def d9() -> list[Case]:
    """After training: folding and recalibration

    torch: `fuse_linear_bn_eval` (torch/nn/utils/fusion.py) multiplies by a weight and adds a
    bias that may be None; `fuse_conv_bn_eval` beside it checks. `update_bn`
    (torch/optim/swa_utils.py) takes the mean over batches with equal weights, so that a small
    last batch counts like a full one. The others have neither. bn_jax: `fold` of
    bn_jax.surgery, and `pooled` of bn_jax/core/population.py.
    """
    x = np.concatenate([normal(12, 1, mean=4), normal(4, 1, mean=-2)])
    batches = x[:12], x[12:]

    def torch_fold(**fields):
        import torch

        x = torch.tensor(normal(16, 3))
        linear, norm = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2, **fields)
        net = torch.nn.Sequential(linear, norm)
        net(x)
        with torch.no_grad():
            folded = torch.nn.utils.fusion.fuse_linear_bn_eval(linear.eval(), norm.eval())
            return (folded(x) - net(x)).abs().max().item()

    def our_fold(affine=True, bias=True):

        norm = BatchNorm(use_running_average=True, use_scale=affine, use_bias=affine and bias)
        net, x = nn.Sequential([nn.Dense(2), norm]), normal(16, 3)
        return fold(net, net.init(jax.random.key(0), x), x, tolerance=np.inf).difference

    def ours():
        return first(_pooled(batches).mean)

    def update_bn():
        import torch

        norm = torch.nn.BatchNorm1d(1)
        torch.optim.swa_utils.update_bn([torch.tensor(b) for b in batches], norm)
        return norm.get_buffer("running_mean").item()

    return [
        *(
            Case(
                f"D9{part}", f"fold, no {field}",
                f"largest difference of the outputs of a linear layer with BatchNorm("
                f"{field}=False) and of both folded into one", 0.0, 1e-5,
                {
                    "torch": lambda field=field: torch_fold(**{field: False}),
                    "bn_jax": lambda field=field: our_fold(**{field: False}),
                },
                raises=True,
            )
            for part, field in (("a", "affine"), ("b", "bias"))
        ),
        Case(
            "D9c", "unequal batches", "mean of a set from its batches of 12 and of 4",
            np.mean(x, dtype=np.float64), 1e-4, {"bn_jax": ours, "torch": update_bn},
        ),
    ]  # fmt: skip


def d10() -> list[Case]:
    """The variance of a set from its batches

    The mean of the variances of batches, or of devices, lacks how their means differ. That is
    what every running variance is (in the paper too: Algorithm 2), what torch's `update_bn`
    and what `lax.pmean` of `batch_stats` in Flax's ImageNet example (`sync_batch_stats`)
    compute; bn_jax's own layer does the same. For shuffled batches the two agree. Where they
    do not (data by class, by domain, by device), bn_jax's `merge` and `pooled` of the Moments
    that `batch_norm` returns have the missing term, and that is what is measured here: not the
    layer.
    """
    x = normal(256, 1, std=2)
    batches = x, x + 10

    def measure(f):
        return first(f.train(batches * 50, momentum=0.9).var)

    true = np.var(np.concatenate(batches), dtype=np.float64)
    return [
        Case(
            "D10", "means apart",
            "variance of a set from two batches with means 10 apart", true, 0.01 * true,
            each(measure) | {"bn_jax": lambda: first(_pooled(batches).var)},
            ours="`pooled`", default=lambda: measure(FRAMEWORKS["bn_jax"]),
        )
    ]  # fmt: skip


def _pooled(batches):

    return pooled(moments(batch) for batch in batches)
