"""Synthetic runs of a comparison, and the summary of them."""

import json

import numpy as np
import pytest

from bn_jax.lab.statistics import Record, Seconds, summarize

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# Of each arm: speed, the largest rate at which it does not diverge, best accuracy, cost.
ARMS = {
    "none": (4.0, 0.12, 0.968, 1.0),
    "bn": (12.0, 1.2, 0.976, 1.35),
    "layer": (9.0, 0.5, 0.972, 1.25),
    "group": (7.0, 0.4, 0.970, 1.3),
}


def make_record(arm, rate, scale, seed, lost):
    """One run: exponential approach to the arm's best accuracy, or divergence."""
    speed, limit, best, cost = ARMS.get(arm, ARMS["bn"])
    noise = np.random.default_rng([seed, int(1e6 * rate), int(10 * scale), len(arm)])
    steps = np.arange(0, 1501, 20)
    tau = 80 / (speed * rate) ** 0.7 * scale**0.5 * noise.lognormal(0, 0.12)
    accuracy = 0.1 + (best + noise.normal(0, 0.002) - 0.1) * (1 - np.exp(-steps / tau))
    accuracy = np.clip(accuracy + noise.normal(0, 0.002, len(steps)), 0, 1).tolist()
    if lost or (lost is None and rate * scale * noise.lognormal(0, 0.1) > limit):
        lost, accuracy[3:] = True, [None] * (len(steps) - 3)
    losses = {f"{s}_loss": [1.0] * len(steps) for s in ("train", "validation", "test")}
    return Record(
        arm=arm, learning_rate=rate, init_scale=scale, momentum=0.9 if arm == "bn" else None,
        seed=seed, steps=steps.tolist(), validation_accuracy=accuracy, test_accuracy=accuracy,
        train_accuracy=accuracy, diverged_at=60 if lost else None, **losses,
        seconds=Seconds(4e-3 * cost * noise.lognormal(0, 0.03)),
    )  # fmt: skip


@pytest.fixture(scope="session")
def make():
    """A function of arms, rates, ... that gives (records, summary)."""

    def build(arms=("none", "bn"), rates=RATES, seeds=3, scales=(1.0,), target=0.95, lost=None):
        records = [
            make_record(arm, rate, scale, seed, lost)
            for arm in arms
            for rate in rates
            for scale in scales
            for seed in range(seeds)
        ]
        about = {"experiment": "compare", "question": "Which?", "dataset": "digits"}
        about |= {"model": "mlp"}
        return records, about | json.loads(
            json.dumps(summarize(records, baseline=arms[0], target=target).to_json())
        )

    return build


@pytest.fixture
def config():
    """As in config.json."""
    return {
        "flags": {"dataset": "digits", "eval_every": 20, "target": None, "quick": False,
                  "learning_rates": list(RATES)},
        "command": "python -m experiments.compare --dataset=digits",
        "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
        "devices": ["cpu"],
        "git_commit": None,
        "seconds": {"total": 41.2, "compilation": 9.0},
    }  # fmt: skip
