"""The command line, `retryproof`: one file a command, over the public library. `exits` lists the exit codes."""
