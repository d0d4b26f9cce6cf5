"""XLA flags that pay, set in one place, before JAX starts its backend."""

from __future__ import annotations

import importlib.metadata
import os

# Convolutions on CPU through XLA's own code instead of the YNN library: a training step of
# a CIFAR-10 network takes 0.6 of the time. A flag that a jaxlib does not know aborts the
# process, hence the range: it is known to be there from 0.10.2 to 0.12.
CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
CONVOLUTION_VALUE = "-individual_convolution"
FIRST, PAST_LAST = (0, 10, 2), (0, 13)


def set_flags() -> str:
    """Adds the flags to `XLA_FLAGS` where this jaxlib knows them and the user has not.

    To be called before the first JAX computation. Returns `XLA_FLAGS` as it then is.
    """
    given = os.environ.get("XLA_FLAGS", "")
    version = importlib.metadata.version("jaxlib").split(".")
    numbers = tuple(int(v) for v in version if v.isdigit())
    if FIRST <= numbers < PAST_LAST and CONVOLUTION_FLAG not in given:
        os.environ["XLA_FLAGS"] = f"{given} {CONVOLUTION_FLAG}={CONVOLUTION_VALUE}".strip()
    return os.environ.get("XLA_FLAGS", "")
