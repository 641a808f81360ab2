"""The two errors that a user may see; everything else is a defect."""


class QuasarError(Exception):
    """Something failed; the message is one clear sentence (exit code 1)."""


class UsageError(QuasarError):
    """The command line or the input cannot be right; the message names the option (exit code 2)."""
