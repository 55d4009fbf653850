"""Listing 100,000 outputs: the first scan, nothing changed, a file added before each listing, one workflow's files.

Goal (issue: models and outputs): p95 under 50 ms after the first scan. All by `Files.list_outputs`, limit 50, on real
files in a temporary folder: once all in one folder, as ComfyUI writes by itself, once in 1,000 folders.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from benchmarks.table import Number, below, percentile, told
from managers.files import Files, FilesConfig, OutputOwner

FILES = 100_000
GOAL_MS = 50.0


class Owner(Struct, frozen=True):
    workflow_id: str
    node_id: str | None


class Owners:
    """A record in memory, so that only the folder is measured."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = {f"workflow-{n}": paths[n * 40 : n * 40 + 40] for n in range(100)}
        self._owners = {path: Owner(name, "9") for name, mine in self._paths.items() for path in mine}

    async def workflows_of(self, paths: Sequence[str]) -> Mapping[str, OutputOwner]:
        return {path: self._owners[path] for path in paths if path in self._owners}

    async def paths_of(self, workflow_id: str) -> Sequence[str]:
        return self._paths[workflow_id]


def _make(root: Path, folders: int) -> list[str]:
    paths = []
    for n in range(FILES):
        path = f"img_{n:06d}_.png" if folders == 1 else f"{n % folders:04d}/img_{n:06d}_.png"
        if folders > 1 and n < folders:
            (root / path).parent.mkdir()
        (root / path).write_bytes(b"x")
        paths.append(path)
    return paths


async def _measure(layout: str, root: Path, folders: int) -> list[Number]:
    files = Files(FilesConfig(outputs=root, models={}), Owners(_make(root, folders)))
    numbers: list[Number] = []

    async def listing(what: str, times: int, *, add: bool = False, workflow_id: str | None = None) -> None:
        taken = []
        for n in range(times):
            if add:
                name = f"added_{n:04d}.png"
                (root / name if folders == 1 else root / f"{n % folders:04d}" / name).write_bytes(b"x")
            started = time.perf_counter()
            page = await files.list_outputs(limit=50, workflow_id=workflow_id)
            taken.append((time.perf_counter() - started) * 1000)
            wanted = 40 if workflow_id else 50
            assert len(page.outputs) == wanted
            # A folder of 100,000 rests between readings: a new file may show a moment later (files/index.py).
            assert not add or folders == 1 or page.outputs[0].filename == name
        name = f"{FILES:,} outputs, {layout}: {what}"
        if times == 1:
            numbers.append(told(name, f"{taken[0]:,.0f} ms"))
        else:
            numbers.append(below(f"{name}, p95", percentile(taken, 95), GOAL_MS, "ms"))

    try:
        await listing("first scan", 1)
        await listing("nothing changed", 300)
        await listing("a file added before each", 100, add=True)
        await listing("one workflow's files", 100, workflow_id="workflow-7")
    finally:
        files.close()
    return numbers


def run() -> list[Number]:
    """Both layouts."""
    numbers = []
    for layout, folders in (("one folder", 1), ("1,000 folders", 1000)):
        with tempfile.TemporaryDirectory() as root:
            numbers += asyncio.run(_measure(layout, Path(root), folders))
    return numbers
