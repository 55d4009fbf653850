"""Words for people: results on stdout, everything else on stderr, and nothing in them that a terminal would obey."""

from __future__ import annotations

import sys


def say(text: str = "") -> None:
    """A line of the result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tell(text: str = "") -> None:
    """A line beside the result."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def complain(text: str, status: int = 1) -> int:
    """What went wrong, in one line; gives the exit status."""
    tell(clean(text))
    return status


def clean(text: str) -> str:
    """Text from elsewhere on one line, without what steers a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
