"""`python -m bn_jax.lab`, as one of the experiments."""

from typing import TYPE_CHECKING

from bn_jax.lab import flags
from bn_jax.lab.config import Config

if TYPE_CHECKING or __name__ != "__main__":  # `--help` does not wait for these
    from bn_jax.lab.comparison import run

__all__ = ["Config", "run"]

if __name__ == "__main__":
    flags.main(Config, "experiments.compare")
