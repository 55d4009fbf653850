"""A driver that says what a test wants: the stub library in a folder of its own, and the file it reads.

Keys of the file: `driver` (the error of all calls, 0 is none), `count`, `hang` (1: no call returns), `calls` (a file
that gets their names), and for each card `<n>.<field>`, for the m-th MIG instance of it `<n>.<m>.<field>`. A field
that is not there is one the card does not support; `!15` is the error 15.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.program import SECONDS

SOURCE = Path(__file__).parent / "nvml_stub.c"
LIBRARY = "libnvidia-ml.so.1"
MIB = 2**20
NOT_LOADED, LOST, MISMATCH = 9, 15, 18


def build(folder: Path, *options: str) -> Path:
    """The stub. Skips the test where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc): the stub of NVIDIA's library cannot be built")
    library = folder / LIBRARY
    strict = ("-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC")
    subprocess.run([compiler, *strict, *options, "-o", library, SOURCE], check=True, timeout=SECONDS)
    return library


def card(n: int, **fields: object) -> dict[str, object]:
    """A card with every field. None takes one away; `memory_reserved` is `memory.reserved`."""
    values: dict[str, object] = {
        "name": f"NVIDIA Stub {n}",
        "uuid": f"GPU-0000000{n}",
        "utilization": 40 + n,
        "memory": f"{(4 + n) * 1024 * MIB} {24 * 1024 * MIB}",
        "memory.reserved": 500 * MIB,
        "temperature": 60 + n,
        "power": 200_500,
        "energy": 1_000_000,
        "processes": "",
        "mig": 0,
    }
    values |= {name.replace("_", "."): value for name, value in fields.items()}
    return {f"{n}.{name}": value for name, value in values.items() if value is not None}


class Driver:
    """`environ` makes a process find it."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder = folder
        self.installed = folder / LIBRARY
        self.calls_file = folder / "calls"
        self._control = folder / "control"
        self.install(library)
        self.says(card(0), count=1)

    @property
    def environ(self) -> dict[str, str]:
        return {"LD_LIBRARY_PATH": str(self.folder), "NVML_STUB": str(self._control)}

    def install(self, library: Path) -> None:
        """In place of what is there; who has that one in memory keeps it."""
        shutil.copy(library, self.folder / "new")
        (self.folder / "new").replace(self.installed)

    def break_library(self) -> None:
        """What no process can load, also on a machine that has a driver."""
        self.installed.write_text("not a library")

    def says(self, *cards: Mapping[str, object], **values: object) -> None:
        """From now on this, and nothing of what it said before."""
        lines: dict[str, object] = {"calls": self.calls_file}
        for more in (*cards, values):
            lines.update(more)
        new = self.folder / "control.new"
        new.write_bytes(b"".join(os.fsencode(f"{key}={value}\n") for key, value in lines.items()))
        new.replace(self._control)

    def calls(self, name: str) -> int:
        """How often it was asked for this."""
        return self.calls_file.read_text().split().count(name) if self.calls_file.exists() else 0

    def until_called(self, name: str) -> None:
        """Until somebody has asked it for this."""
        for _ in range(SECONDS * 100):
            if self.calls(name):
                return
            time.sleep(0.01)
        raise AssertionError(f"nobody asked the driver for {name}")
