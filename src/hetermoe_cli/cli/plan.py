"""`hetermoe plan`."""


def plan() -> None:
    """To be written."""
