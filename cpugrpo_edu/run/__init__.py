"""A whole run: configuration, data, stages, checkpoints, results and export."""
