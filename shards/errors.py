"""The errors of this package, and the exit codes of commands that end with them; the bottom of every import.

A `UserError` names in one line the field, its value and a cure. Commands print it and exit with code 2; nothing
retries it. A `DamagedError` means that stored bytes are not the bytes that were written, a `StoreError` that a
store did not answer properly although it was asked often enough. A full disk is both: its owner makes room, and a
job that meets one may try again.
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


class NoRoomError(UserError, StoreError):
    """A disk is full or may not be written. The message names place, bytes, reason and cure."""

    exit_code = 2


class BadInputError(ValueError):
    """One input that cannot become a sample; the message says why."""
