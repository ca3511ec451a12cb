"""What can be wrong with what a user gave us, or with what lies on disk; the bottom of every import.

A `UserError` says in one line which field holds which value and what to do about it. Commands print
it and leave with exit code 2; nothing retries it, because trying again changes nothing.
A `DamagedError` says that stored bytes are not the bytes that were written.
"""


class UserError(ValueError):
    """A mistake in what the user gave us. The message names the field, its value and the cure."""

    exit_code = 2


class DamagedError(RuntimeError):
    """Stored bytes differ from what their manifest promises. The message names file and place."""

    exit_code = 1
