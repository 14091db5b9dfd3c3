"""The one error a user may cause, and the exit codes every verb keeps to."""

DONE = 0
FAILED = 1
WRONG = 2
INTERRUPTED = 75


class UserError(Exception):
    """Bad input: its message is one line that names the field or file, what was found and what is allowed.

    The command line prints it without a traceback and exits with `WRONG`.
    """
