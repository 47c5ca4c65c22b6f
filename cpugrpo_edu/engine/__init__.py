"""What makes GRPO fast on a CPU: decoding, INT8, packing, memory, and the TRL trainer."""
