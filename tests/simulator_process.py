"""A simulator as a real process on a free port, for tests. It is ended by its own process id."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_START = "simulator: "


def start_simulator(directory: Path, *args: str) -> tuple[str, subprocess.Popen[str]]:
    """Start one; gives its URL when it accepts connections. The caller ends it with `end`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "management_api.simulator", "--port", "0", "--directory", str(directory), *args],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith(_START):
        end(process)
        raise RuntimeError(f"the simulator did not start: {line!r}")
    return line.removeprefix(_START).strip(), process


def end(process: "subprocess.Popen[str]") -> None:
    """Kill the process (it may be dead already) and collect it."""
    process.kill()
    process.wait(timeout=10)
    if process.stdout is not None:
        process.stdout.close()


@contextmanager
def simulator(directory: Path, *args: str) -> "Iterator[tuple[str, subprocess.Popen[str]]]":
    """`with simulator(tmp_path, "--faults") as (url, process)`: a running simulator, gone afterwards."""
    url, process = start_simulator(directory, *args)
    try:
        yield url, process
    finally:
        end(process)
