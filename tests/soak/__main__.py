"""`python -m tests.soak --minutes 10`: a light load, and whether anything grows. Exit status 1 when it does."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.evidence import own_faults
from tests.soak.run import soak
from tests.soak.samples import Tolerance, growth, table

_SAMPLES = 60


def _every(seconds: float) -> Callable[[str], None]:
    """Prints a line if the last one was so long ago."""
    last = -seconds

    def say(line: str) -> None:
        nonlocal last
        if (now := time.monotonic()) >= last + seconds:
            last = now
            print(line, flush=True)

    return say


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long (default %(default)s)")
    parser.add_argument("--rounds", type=float, default=4, help="rounds of the load a second (default %(default)s)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    seconds = given.minutes * 60
    every = max(0.5, seconds / _SAMPLES)
    found = asyncio.run(
        soak(
            folder,
            seconds=seconds,
            rounds_a_second=given.rounds,
            every=every,
            say=_every(3),
        )
    )
    print("\n".join(table(found.samples)))
    for name, count in sorted(found.done.items()):
        print(f"  {name:<24} {count:>7}")
    faults = growth(found.samples, Tolerance())
    faults += [f"{what}, {count} times" for what, count in found.wrong.items()]
    faults += own_faults(folder / "service.log")
    if found.status != 0:
        faults.append(f"SIGTERM ended the service with status {found.status}")
    for fault in faults:
        print(f"  wrong: {fault}")
    print(f"what is left of it is in {folder}" if faults else "nothing grew")
    if not faults:
        shutil.rmtree(folder)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
