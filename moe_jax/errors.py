"""The exceptions that a user is told of in one line."""


class UserError(Exception):
    """A mistake of the user: its text is one line that names the fix. Scripts print it and exit with code 2."""


class LoadError(UserError):
    """An expert could not be brought to the device; its text names file, layer and expert. To take it tries again."""
