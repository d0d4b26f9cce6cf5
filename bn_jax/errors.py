"""What a user got wrong, as opposed to a fault of the program."""


class UserError(ValueError):
    """One line that names the value and what to do; a command prints it and exits with 2."""
