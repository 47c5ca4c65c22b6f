"""What `python -m cpugrpo_edu.cli` runs."""

from cpugrpo_edu.cli import main

main()
