"""The benchmark of accumulation: what it says of the gradients."""

import pytest

from benchmarks import accumulate
from bn_jax.errors import UserError


@pytest.mark.long
def test_one_form_is_exact_and_the_other_is_not():
    config = accumulate.Config(
        models=("mlp",), batch=8, size=2, micro_batches=(2,), rounds=1, page_faults=True
    )
    whole, own, exact = accumulate.run(config)
    assert [row["form"] for row in (own, exact)] == ["accumulate", "accumulate_exactly"]
    assert whole["difference"] == 0
    assert exact["difference"] < 1e-5 < 1e-2 < own["difference"]
    assert all(row["seconds"] > 0 for row in (whole, own, exact))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"models": ("rnn",)}, "--models: 'rnn' is none of mlp, cnn"),
        ({"micro_batches": (3,)}, "--micro_batches: 3 does not split a batch of 256"),
        ({"batch": 4, "micro_batches": (4,)}, "two examples at least"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(UserError, match=message):
        accumulate.Config(**flags)
