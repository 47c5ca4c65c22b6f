"""Progress, plots and reports."""
