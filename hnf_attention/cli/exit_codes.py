"""What the exit code of a command says."""

HEALTHY, FOUND, USAGE, INTERRUPTED = 0, 1, 2, 130
# The reader of a pipe left. 128 + 13, as if the signal of a broken pipe had ended the process.
PIPE_CLOSED = 141
