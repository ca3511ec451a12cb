"""What can be wrong with what a user gave us, or with what lies on disk; the bottom of every import.

A `UserError` says in one line which field holds which value and what to do about it. Commands print
it and leave with exit code 2; nothing retries it, because trying again changes nothing.
A `DamagedError` says that stored bytes are not the bytes that were written. A `StoreError` says that a
store did not answer as one does, although it was asked often enough.
"""


class UserError(ValueError):
    """A mistake in what the user gave us. The message names the field, its value and the cure."""

    exit_code = 2


class DamagedError(RuntimeError):
    """Stored bytes differ from what their manifest promises. The message names file and place."""

    exit_code = 1


class ChangedError(DamagedError):
    """An object was replaced while it was read. The message names it."""


class FencedError(RuntimeError):
    """A newer attempt has taken over; this one must stop and may not publish."""


class StoreError(OSError):
    """A store is out of reach or out of order. The message names place, what was seen, and how often."""

    exit_code = 1


class BadInputError(ValueError):
    """One input that cannot become a sample; the message says why."""
