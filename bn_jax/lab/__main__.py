from bn_jax.lab import flags
from bn_jax.lab.config import Config

flags.main(Config, "bn_jax.lab.comparison")
