"""The one error a user may see: a single line that says what was given, what was expected and what to do.

Every command runs under `run_command`, which prints that line without a traceback and returns exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake in what the user gave (file, key or argument), told in one line."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose mistakes are `UserError`s, one line like all others; abbreviations are not guessed."""

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(prog=f"subject-diffusion {command}", allow_abbrev=False, **options)
        self.command = command

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.command}: {message}; see {self.prog} --help")


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Exit status of `main(argv)`: its own, 2 for a user's mistake, 130 when interrupted."""
    try:
        return main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
        return 130
