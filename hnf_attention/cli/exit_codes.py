"""What the exit code of a command says."""

HEALTHY, FOUND, USAGE, INTERRUPTED = 0, 1, 2, 130
