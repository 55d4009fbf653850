"""`python -m management_api.simulator`: a simulator as a process of its own.

Prints one line, `simulator: URL`, when it accepts connections. SIGTERM ends it at once and without a word to its
clients, as it ends a real ComfyUI; Ctrl-C wipes the previews first.
"""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

import uvloop

from management_api.simulator.options import SimulatorOptions


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a simulator can be told to a command line."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8188, help="0 = any free one (default %(default)s)")
    parser.add_argument("--directory", type=Path, required=True, help="gets output, input, temp and models")
    parser.add_argument("--preview", action="store_true", help="the sampler sends previews")
    parser.add_argument("--comfyui-version", default="0.3.64", metavar="V", help="what /system_stats says")
    parser.add_argument("--no-models", action="store_true", help="show no made-up model in empty model folders")
    parser.add_argument("--without", action="append", default=[], metavar="CLASS", help="a node class it lacks")
    parser.add_argument("--step-seconds", type=float, default=0.05, help="time of one sampler step")
    parser.add_argument(
        "--max-upload-size", type=float, default=100, metavar="MB", help="of a body (default %(default)s)"
    )
    parser.add_argument("--faults", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ledger", type=Path, metavar="FILE", help=argparse.SUPPRESS)


def options(given: argparse.Namespace) -> SimulatorOptions:
    """The options that a parsed command line means."""
    return SimulatorOptions(
        directory=given.directory,
        host=given.host,
        port=given.port,
        previews=given.preview,
        version=given.comfyui_version,
        pretend_models=not given.no_models,
        step_seconds=given.step_seconds,
        max_upload_bytes=round(given.max_upload_size * 1024 * 1024),
        without=tuple(given.without),
        faults=given.faults,
        ledger=given.ledger,
    )


def run(chosen: SimulatorOptions) -> int:
    """Serve until a signal ends the process. Gives the exit status when it could not start."""
    from management_api.simulator.object_info import leave_out
    from management_api.simulator.server import serve

    def interrupted(_number: int, _frame: object) -> None:
        shutil.rmtree(chosen.directory / "temp", ignore_errors=True)
        os._exit(130)

    def ready(url: str) -> None:
        sys.stdout.write(f"simulator: {url}\n")
        sys.stdout.flush()

    leave_out(chosen.without)
    signal.signal(signal.SIGINT, interrupted)
    try:
        uvloop.run(serve(chosen, ready))
    except OSError as error:
        sys.stderr.write(f"simulator: {error}\n")
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="management-api simulator", description="A simulated ComfyUI.")
    arguments(parser)
    return run(options(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
