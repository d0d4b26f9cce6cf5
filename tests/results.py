"""Records and results of runs that nobody trained."""

from bn_jax.lab.statistics import ArmResult, Record, Seconds, Summary
from bn_jax.lab.statistics.convergence import Estimate, Ratio
from bn_jax.lab.statistics.summary import Speedup, Target


def make_record(arm="bn", learning_rate=0.1, seed=0, accuracy=(0.1, 0.5, 0.9), **changes):
    """A run that is tested as often as it has accuracies, every ten steps."""
    accuracy = list(accuracy)
    losses = [1.0] * len(accuracy)
    series = {f"{split}_accuracy": accuracy for split in ("train", "validation", "test")}
    series |= {f"{split}_loss": losses for split in ("train", "validation", "test")}
    given = {"init_scale": 1.0, "momentum": None, "seconds": Seconds(1.0)}
    given |= {"steps": [10 * i for i in range(len(accuracy))]} | series | changes
    return Record(arm=arm, learning_rate=learning_rate, seed=seed, **given)


def sure(value):
    """An estimate without width."""
    return Estimate(value, (value, value), 5)


def make_arm(arm="bn", learning_rate=0.1, **changes):
    """An arm whose five runs all reached the target."""
    given = {
        "init_scale": 1.0, "momentum": None, "seeds": 5, "reached": 5, "diverged": 0,
        "steps_to_target": sure(10.0), "seconds_to_target": sure(1.0), "trains": True,
        "max_accuracy": sure(0.9), "final_accuracy": sure(0.9),
    }  # fmt: skip
    return ArmResult(arm=arm, learning_rate=learning_rate, **given | changes)


def make_summary(*arms, target=0.8, ratios=(), points=None):
    """A comparison with the first of the arms; `ratios` are of the steps of the others."""
    none = Ratio(None, (None, None))
    speedups = tuple(
        Speedup(arm, arms[0], ratio if isinstance(ratio, Ratio) else sure_ratio(ratio), none)
        for arm, ratio in zip(arms[1:], ratios, strict=False)
    )
    goal = Target(target, "given", target)
    return Summary(arms[0].arm, 1500, goal, arms, speedups, None, points or arms)


def sure_ratio(value):
    return Ratio(value, (value, value))


def timeless(record):
    """The line of a record, without its arm and what differs from run to run."""
    return {k: v for k, v in record.to_json().items() if k not in ("arm", "seconds")}
