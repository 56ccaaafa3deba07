"""`hetermoe profile`."""


def profile() -> None:
    """To be written."""
