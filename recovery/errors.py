"""The user's mistakes, told in one clear line each, and the exit codes of every command."""

from __future__ import annotations

import re

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
CREDENTIALS = re.compile(r"//[^/\s'\"]*@")
"""The user and password of a URL, up to the last @ before its path."""


class UserError(Exception):
    """The user's input is wrong: exit code 2, no traceback, nothing written.

    where: dotted recipe path or file; found: what stood there; remedy: what to do about it.
    """

    def __init__(self, where: str, found: str, remedy: str) -> None:
        super().__init__(_printable(f"{where}: {found}; {remedy}"))
        self.where = where
        self.found = found
        self.remedy = remedy


def _printable(text: str) -> str:
    """With what would command a terminal (names in a file from outside may hold it) spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def without_credentials(text: str) -> str:
    return CREDENTIALS.sub("//", text)


def first_line(error: BaseException) -> str:
    """What an error says, in one line without passwords; its kind where it says nothing."""
    return without_credentials((str(error).strip().splitlines() or [type(error).__name__])[0])


class UserErrors(UserError):
    """Several mistakes found together, one line each."""

    def __init__(self, errors: list[UserError]) -> None:
        Exception.__init__(self, "\n".join(str(error) for error in errors))
        self.errors = errors


class DamagedArtifact(UserError):
    """A finished artifact whose files no longer match its manifest."""


class Unavailable(Exception):
    """Something outside is gone (servers, a node): one line, exit code 1, and the same command goes on later."""
