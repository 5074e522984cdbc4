"""Kinds of command-line arguments, as argparse's `type=`; a mistake in them is told by `CommandParser` in one line."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def png_file(text: str) -> Path:
    """A file to write a picture to; its folder is made."""
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, got {text!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent} cannot be made ({error.strerror})") from error
    return path
