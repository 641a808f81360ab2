"""The command line of `quasar`."""

INTERRUPTED = 130  # the exit code after Ctrl-C
