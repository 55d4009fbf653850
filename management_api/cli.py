"""The command line: `management-api COMMAND`. Only words here; each command is a module of `commands`.

Must never import anything heavy before it is known what is wanted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent, indent
from typing import TypeAlias

Command = Callable[[argparse.Namespace], int]
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 -- it has no public name


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; gives the exit status."""
    parser = build_parser()
    given = parser.parse_args(argv)
    command: Command = given.command
    try:
        return command(given)
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from management_api import __version__

    parser = argparse.ArgumentParser(
        prog="management-api", description="A durable priority queue with REST and live events in front of ComfyUI."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_monitor(commands)
    _add_demo(commands)
    _add_simulator(commands)
    _add_submit(commands)
    _add_keys(commands)
    _add_config(commands)
    _add_doctor(commands)
    _add_backup(commands)
    return parser


def _add(
    commands: Commands, name: str, run: Command, summary: str, text: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{dedent(text).strip()}",
        epilog=f"example:\n{indent(dedent(example).strip(), '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def _add_serve(commands: Commands) -> None:
    def run(given: argparse.Namespace) -> int:
        from management_api.commands.serve import run

        return run(drain=given.drain)

    parser = _add(
        commands,
        "serve",
        run,
        "run the service",
        """
        Settings come from the environment and from .env in the working directory; `management-api config` shows
        them all. SIGTERM and Ctrl-C stop it in order, a second one at once: what was accepted is on disk.
        """,
        """
        MANAGEMENT_API_KEY=$(openssl rand -hex 24) COMFYUI_URL=http://127.0.0.1:8188 management-api serve
        """,
    )
    parser.add_argument(
        "--drain",
        action="store_true",
        help="when stopped, wait first for the workflows that run, within MANAGEMENT_API_SHUTDOWN_SECONDS; its "
        "default, 30 s, is short for that: give it as long as a workflow may take (also MANAGEMENT_API_DRAIN=true)",
    )


def _add_monitor(commands: Commands) -> None:
    def run(_: argparse.Namespace) -> int:
        from management_api.commands.monitor import run

        return run()

    _add(
        commands,
        "monitor",
        run,
        "tell EventBridge what others submit to a ComfyUI",
        """
        It takes no work, and submits and stops nothing. A client id is printed at the start: what is submitted to
        ComfyUI under it is told with every node; of all else start, end and outputs are told. With S3_BUCKET
        outputs are uploaded too. /health, /ready and /metrics are on MANAGEMENT_API_PORT.
        """,
        """
        EVENTBRIDGE_BUS_NAME=comfyui COMFYUI_URL=http://127.0.0.1:8188 management-api monitor
        """,
    )


def _add_demo(commands: Commands) -> None:
    def run(given: argparse.Namespace) -> int:
        from management_api.commands.demo import run

        return run(given)

    parser = _add(
        commands,
        "demo",
        run,
        "the service with a simulated ComfyUI, and a picture made while you watch",
        """
        On 127.0.0.1 only, with a key and a folder of its own; nothing of the environment or .env is used.
        """,
        """
        management-api demo --once
        """,
    )
    parser.add_argument("--once", action="store_true", help="end after the picture")
    parser.add_argument("--port", type=int, metavar="N", help="default 9090, or a free one when that is taken")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to keep everything (default: a new one)")


def _add_simulator(commands: Commands) -> None:
    from management_api.simulator import __main__ as simulator

    def run(given: argparse.Namespace) -> int:
        if find_spec("PIL") is None:
            from management_api.commands.terminal import complain

            return complain("The simulator draws with Pillow: pip install 'comfyui-management-api[simulator]'")
        return simulator.run(simulator.options(given))

    parser = _add(
        commands,
        "simulator",
        run,
        "a small stand-in for ComfyUI, for demos and tests",
        "It speaks ComfyUI's protocol and draws pictures that say they are simulated. It runs no model.",
        """
        management-api simulator --port 8188 --directory /tmp/comfyui
        """,
    )
    simulator.arguments(parser)


def _add_submit(commands: Commands) -> None:
    def run(given: argparse.Namespace) -> int:
        from management_api.commands.submit import run

        return run(given)

    parser = _add(
        commands,
        "submit",
        run,
        "hand in a workflow, watch it, fetch its files",
        """
        The workflow is a graph in API format (ComfyUI: Export (API)). Without --watch, --wait and --out its id is
        printed and that is all. The key and the address come from MANAGEMENT_API_KEY and MANAGEMENT_API_URL.

        Exit status: 0 completed (or accepted), 1 failed or cancelled, 2 refused, 3 service unreachable,
        130 interrupted.
        """,
        """
        management-api submit workflow.json --watch --priority high --out pictures
        """,
    )
    parser.add_argument("workflow", help="a JSON file, or - for standard input")
    parser.add_argument("--watch", action="store_true", help="show its progress to the end")
    parser.add_argument("--wait", action="store_true", help="wait for the end in silence")
    parser.add_argument("--priority", choices=("low", "normal", "high"), default="normal")
    parser.add_argument("--gpu", default="local", metavar="NAME", help="a backend or pool (default: any)")
    parser.add_argument("--strict", action="store_true", help="refuse what only might run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="fetch the files into this folder")
    parser.add_argument("--force", action="store_true", help="replace files that are there already")
    parser.add_argument("--cancel-on-interrupt", action="store_true", help="Ctrl-C cancels the workflow too")
    parser.add_argument("--url", help="the service (default: MANAGEMENT_API_URL, or this machine)")
    parser.add_argument("--key", help="the key; others can see it here, MANAGEMENT_API_KEY is better")


def _add_keys(commands: Commands) -> None:
    def run(given: argparse.Namespace) -> int:
        from management_api.commands.keys import run

        return run(given)

    def scopes(text: str) -> object:
        from management_api.commands.keys import scopes

        return scopes(text)

    def duration(text: str) -> object:
        from management_api.commands.keys import duration

        return duration(text)

    parser = _add(
        commands,
        "keys",
        run,
        "keys beside MANAGEMENT_API_KEY, each with its own rights",
        """
        In the file that MANAGEMENT_API_KEYS_FILE names, as hashes. A running service follows within a second.
        """,
        """
        management-api keys add shop --scope submit --scope read --max-queued 50 --expires 90d
        """,
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    add = actions.add_parser("add", help="make a key, and print it on stdout: once, and nothing else")
    add.add_argument("name", metavar="NAME", help="what logs and workflows call it")
    add.add_argument(
        "--scope",
        type=scopes,
        action="extend",
        required=True,
        metavar="SCOPE",
        help="read: look; submit: hand in, cancel, retry; admin: everything. May be given several times",
    )
    add.add_argument("--rate-limit", metavar="RATE", help="its own, like 1000/minute or off (default: its address's)")
    add.add_argument("--max-queued", type=int, metavar="N", help="how many workflows of it may wait (default: any)")
    add.add_argument("--expires", type=duration, metavar="TIME", help="after 30m, 12h or 90d (default: never)")
    listing = actions.add_parser("list", help="show the keys, without hashes")
    revoke = actions.add_parser("revoke", help="take a key out")
    revoke.add_argument("name", metavar="NAME")
    for action in (add, listing, revoke):
        action.add_argument("--file", type=Path, help="default: MANAGEMENT_API_KEYS_FILE")


def _add_config(commands: Commands) -> None:
    def run(_: argparse.Namespace) -> int:
        from management_api.commands.config import run

        return run()

    _add(
        commands,
        "config",
        run,
        "show the settings in effect",
        "With where each comes from. Secrets, and passwords in addresses, are masked.",
        "management-api config | grep COMFYUI",
    )


def _add_doctor(commands: Commands) -> None:
    def run(_: argparse.Namespace) -> int:
        from management_api.commands.doctor import run

        return run()

    _add(
        commands,
        "doctor",
        run,
        "check everything the service needs, and say what to do",
        """
        Key, data folder, store, port, clock, folders; and each ComfyUI: does it answer, which version, its socket.
        It changes nothing. Exit status 1 when something is wrong.
        """,
        "management-api doctor",
    )


def _add_backup(commands: Commands) -> None:
    def run(given: argparse.Namespace) -> int:
        from management_api.commands.backup import run

        return run(given)

    parser = _add(
        commands,
        "backup",
        run,
        "a consistent copy of the queue and its records",
        """
        May be taken while the service runs. To restore, stop the service and put the copy into its data folder as
        workflows.sqlite3, without the files workflows.sqlite3-wal and -shm that lie there.
        """,
        "management-api backup /backups/workflows-$(date +%F).sqlite3",
    )
    parser.add_argument("file", type=Path, help="must not exist yet")


if __name__ == "__main__":
    sys.exit(main())
