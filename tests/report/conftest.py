"""Synthetic runs, and a summary of them in the format of summary.json.

The intervals are the extremes over seeds, a stand-in for the bootstrap of bn_jax.measure.
"""

import numpy as np
import pytest

BUDGET = 1500
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# Of each arm: speed, the largest rate at which it does not diverge, best accuracy, cost.
ARMS = {
    "none": (4.0, 0.12, 0.968, 1.0),
    "bn": (12.0, 1.2, 0.976, 1.35),
    "layer": (9.0, 0.5, 0.972, 1.25),
    "group": (7.0, 0.4, 0.970, 1.3),
}
COORDINATES = ("arm", "learning_rate", "init_scale", "momentum")


def make_record(arm, rate, scale, seed, *, budget=BUDGET, every=20, lost=None):
    """One run: exponential approach to the arm's best accuracy, or divergence."""
    speed, limit, best, cost = ARMS.get(arm, ARMS["bn"])
    noise = np.random.default_rng([seed, int(1e6 * rate), int(10 * scale), len(arm)])
    steps = np.arange(0, budget + 1, every)
    tau = 80 / (speed * rate) ** 0.7 * scale**0.5 * noise.lognormal(0, 0.12)
    accuracy = 0.1 + (best + noise.normal(0, 0.002) - 0.1) * (1 - np.exp(-steps / tau))
    accuracy = np.clip(accuracy + noise.normal(0, 0.002, len(steps)), 0, 1)
    if lost is None:
        lost = rate * scale * noise.lognormal(0, 0.1) > limit
    end = 60 if lost else None
    alive = [
        None if lost and s >= end else float(a) for s, a in zip(steps, accuracy, strict=True)
    ]
    loss = [None if a is None else float(-np.log(a)) for a in alive]
    return {
        "arm": arm, "learning_rate": rate, "init_scale": scale,
        "momentum": 0.9 if arm == "bn" else None, "seed": seed,
        "steps": steps.tolist(), "train_loss": [None, *loss[1:]],
        "validation_accuracy": alive, "validation_loss": loss,
        "test_accuracy": alive, "test_loss": loss, "diverged_at": end,
        "seconds": {"per_step": 4e-3 * cost * noise.lognormal(0, 0.03), "evaluation": 0.8,
                    "compilation": 3.1, "runs_at_once": 70},
    }  # fmt: skip


def spread(found):
    """Median, least and greatest of numbers of steps, of which None is infinite."""
    found = sorted(np.inf if v is None else v for v in found)
    ends = [found[0], found[-1]]
    return {
        "median": clean(float(np.median(found))),
        "ci95": [clean(e) for e in ends],
    }


def clean(value):
    return float(value) if np.isfinite(value) else None


def steps_to(record, target):
    reached = [
        step
        for step, a in zip(record["steps"], record["test_accuracy"], strict=True)
        if a is not None and a >= target
    ]
    return reached[0] if reached else None


def summarise_point(records, target):
    steps = [steps_to(r, target) for r in records]
    per_step = [r["seconds"]["per_step"] for r in records]
    alive = [[a for a in r["test_accuracy"] if a is not None] for r in records]
    final = spread([r["test_accuracy"][-1] or 0.0 for r in records])
    return {k: records[0][k] for k in COORDINATES} | {
        "seeds": len(records),
        "reached": sum(s is not None for s in steps),
        "steps_to_target": spread(steps),
        "seconds_to_target": spread(
            [None if s is None else s * p for s, p in zip(steps, per_step, strict=True)]
        ),
        "max_accuracy": spread([max(a) for a in alive]),
        "final_accuracy": final,
        "trains": final["median"] >= 0.9 * target,
        "diverged": sum(r["diverged_at"] is not None for r in records),
    }


def speedups(arms, baseline, budget):
    base = next(a for a in arms if a["arm"] == baseline)

    def part(arm, key):
        ours, theirs = arm[key], base[key]
        if ours["median"] is None or theirs["median"] is None:
            bounded = ours["median"] is not None and key == "steps_to_target"
            bound = {"at_least": budget / ours["median"]} if bounded else {}
            return {"ratio": None, "ci95": [None, None]} | bound
        ratio = theirs["median"] / ours["median"]
        return {"ratio": ratio, "ci95": [0.8 * ratio, 1.2 * ratio]}

    return [
        {"arm": a["arm"], "over": baseline, "steps": part(a, "steps_to_target"),
         "seconds": part(a, "seconds_to_target")}
        for a in arms if a["arm"] != baseline
    ]  # fmt: skip


def best_of(points):
    best = min(
        points,
        key=lambda p: (not p["trains"], -p["reached"], p["steps_to_target"]["median"] or 1e9),
    )
    rates = [p["learning_rate"] for p in points if p["trains"]]
    return best | {"trainable_learning_rates": [min(rates), max(rates)] if rates else None}


def summarise(records, *, target=0.95, budget=BUDGET):
    groups = {}
    for record in records:
        groups.setdefault(tuple(record[k] for k in COORDINATES), []).append(record)
    points = [summarise_point(group, target) for group in groups.values()]
    names = list(dict.fromkeys(p["arm"] for p in points))
    arms = [best_of([p for p in points if p["arm"] == name]) for name in names]
    rate, scale = arms[0]["learning_rate"], arms[0]["init_scale"]
    same = [p for p in points if (p["learning_rate"], p["init_scale"]) == (rate, scale)]
    return {
        "experiment": "compare", "dataset": "digits", "model": "mlp", "baseline": names[0],
        "budget_steps": budget,
        "target": {"metric": "test_accuracy", "value": target, "chosen": "given"},
        "arms": arms, "speedup": speedups(arms, names[0], budget),
        "at_same_learning_rate": {"learning_rate": rate, "init_scale": scale, "arms": same,
                                  "speedup": speedups(same, names[0], budget)},
        "by_point": points,
    }  # fmt: skip


@pytest.fixture
def make():
    """A function of arms, rates, ... that gives (records, summary)."""

    def build(arms=("none", "bn"), rates=RATES, seeds=5, scales=(1.0,), target=0.95, lost=None):
        records = [
            make_record(arm, rate, scale, seed, lost=lost)
            for arm in arms
            for rate in rates
            for scale in scales
            for seed in range(seeds)
        ]
        return records, summarise(records, target=target)

    return build


@pytest.fixture
def config():
    """As in config.json."""
    return {
        "flags": {"dataset": "digits", "eval_every": 20, "arms": ["none", "bn"], "target": None,
                  "quick": False, "learning_rates": list(RATES)},
        "command": "python -m experiments.compare --dataset=digits",
        "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
        "devices": ["cpu"],
        "git_commit": None,
        "seconds": {"total": 41.2, "compilation": 9.0, "evaluation": 4.0, "training": 25.0},
    }  # fmt: skip
