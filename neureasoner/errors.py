"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Bad input. One line that names the cause and the fix; the command line prints it and exits with 2."""
