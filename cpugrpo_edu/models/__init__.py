"""Load, save and pretrain policies; the bundled model's files."""

from cpugrpo_edu.models.load import load_policy, save_policy
from cpugrpo_edu.policy import Policy

__all__ = ["Policy", "load_policy", "save_policy"]
