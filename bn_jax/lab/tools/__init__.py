"""Operations of `bn_jax.surgery` on checkpoints: commands."""
