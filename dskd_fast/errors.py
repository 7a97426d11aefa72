"""Errors that a user can cause and mend, and ways to end that are no errors."""


class UserError(Exception):
    """Something the user can put right.

    The message is one sentence that says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with a code other than 0.
    """


class TrainingStopped(Exception):
    """A signal stopped a training, whose state was saved first; the message says how to go on.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class PeerFailed(Exception):
    """Another process of those that train together failed or stopped.

    Without a message it says itself why.
    """
