"""What was measured: records, statistics, metrics and safe files."""
