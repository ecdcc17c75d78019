"""The one exception that this package raises for bad input."""


class DistillError(ValueError):
    """What the user gave cannot be used: the message names the value, what was expected and what to do."""
