"""The one error a user sees, and the documented exit codes."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; docs/commands.md documents the same table."""

    DONE = 0
    NO_READER = 1  # typer's and rich's code as well
    USAGE = 2
    BAD_INPUT = 3
    DOES_NOT_FIT = 4
    SOLVER = 5
    WORKER_DIED = 6
    INTERRUPTED = 130


class UserError(Exception):
    """A problem the user can fix, told in one line: where, what is wrong, what to do.

    The CLI prints the message without a traceback and exits with `code`.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.BAD_INPUT) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code
