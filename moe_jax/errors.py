"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A mistake of the user: its text is one line that names the fix. Scripts print it and exit with code 2."""
