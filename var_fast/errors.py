"""The error that a user can mend."""


class UserError(ValueError):
    """Bad input: the message names the argument, the value and what was expected, in one line."""
