"""The command line, `retryproof`: one file for each command, on top of the library. `exits` has the exit codes."""
