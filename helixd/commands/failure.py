"""How a subcommand ends badly: one line on stderr, and a status."""

from helixd.errors import HelixError
from helixd.exits import Exit


class CommandFailed(HelixError):
    """The command cannot go on. The message is the one line that its user reads."""

    def __init__(self, message: str, status: Exit) -> None:
        super().__init__(message)
        self.status = status
