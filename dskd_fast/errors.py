"""Errors that a user can cause and mend."""


class UserError(Exception):
    """Something the user can put right.

    The message is one sentence that says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with a code other than 0.
    """
