"""What ails a model with BatchNorm layers, and where: findings, worst first."""

from bn_jax.surgery.diagnose.diagnosis import diagnose
from bn_jax.surgery.diagnose.findings import Finding, findings_to_json

__all__ = ["Finding", "diagnose", "findings_to_json"]
