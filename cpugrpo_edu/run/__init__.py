"""A whole run: settings, data, stages, checkpoints, results and export."""
