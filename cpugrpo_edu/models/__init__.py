"""Load, save and pretrain policies; the bundled model's files."""
