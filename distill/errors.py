"""The one exception that this package raises for bad input."""


class DistillError(ValueError):
    """What the user gave cannot be used: the message names the value, what was expected and what to do.

    Attributes:
        is_lazy: whether it is about a Python config, whose keys the message is to have; None for the command's own.
    """

    is_lazy: bool | None = None
