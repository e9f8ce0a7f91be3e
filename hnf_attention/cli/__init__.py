"""The command line: one command a module, each with a `run(options)` that returns the exit code."""
