"""Exit statuses of the commands, and the one exception for mistakes of the user."""

DONE = 0
FAILED = 1
WRONG = 2
INTERRUPTED = 75  # the command can be run again to continue


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line: the setting or file, what was found, and what is allowed. The command line prints it
    without a traceback and exits with `WRONG`.
    """
