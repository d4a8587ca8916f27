"""The one exception that means: the user's input is at fault, not this code."""


class UserError(ValueError):
    """What is wrong, where, and what to do about it, in one line; commands exit with code 2."""
