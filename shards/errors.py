"""The one error a user can cause, at the bottom of every import.

A `UserError` says in one line which field holds which value and what to do about it. Commands print
it and leave with exit code 2; nothing retries it, because trying again changes nothing.
"""


class UserError(ValueError):
    """A mistake in what the user gave us. The message names the field, its value and the cure."""

    exit_code = 2
