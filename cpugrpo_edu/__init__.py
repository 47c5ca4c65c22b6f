"""Learn GRPO by running it: reinforcement learning for language models on ordinary CPUs."""

__version__ = "0.1.0"
