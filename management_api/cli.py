"""The command line: `management-api COMMAND`. Only words here; each command is a module of `commands`.

Must never import anything heavy before it is known what is wanted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; gives the exit status."""
    parser = build_parser()
    given = parser.parse_args(argv)
    command: Command = given.command
    return command(given)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from management_api import __version__

    parser = argparse.ArgumentParser(
        prog="management-api", description="A durable priority queue with REST and live events in front of ComfyUI."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve = commands.add_parser("serve", help="run the service")
    serve.set_defaults(command=_serve)
    return parser


def _serve(_: argparse.Namespace) -> int:
    from management_api.commands.serve import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
