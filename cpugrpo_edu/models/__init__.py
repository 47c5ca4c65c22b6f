"""Load, save and pretrain policies; the bundled model's files."""

from cpugrpo_edu.models.load import load_policy as load_policy
from cpugrpo_edu.models.load import save_policy as save_policy
from cpugrpo_edu.policy import Policy as Policy
