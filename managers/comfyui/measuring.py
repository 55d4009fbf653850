"""Size, etag and address of what a run wrote: on this machine by a look at the file, elsewhere through /view.

Must never open a file; a file that is not there (any more) has no size, and that is no error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from msgspec.structs import replace

from managers.comfyui.client import ComfyUIClient
from managers.comfyui.remote_file import describe_remote
from managers.errors import BackendUnavailable, NotFound
from managers.events.types import Output


class Measuring:
    """The outputs of one run, each measured as soon as ComfyUI has named it: by the verdict that is done."""

    def __init__(self, measure: Callable[[Sequence[Output]], Coroutine[None, None, tuple[Output, ...]]]) -> None:
        self._measure = measure
        self._tasks: list[asyncio.Task[tuple[Output, ...]]] = []

    def begin(self, outputs: Sequence[Output]) -> None:
        """Their files are there now."""
        self._tasks.append(asyncio.create_task(self._measure(outputs)))

    async def done(self, found: Sequence[Output]) -> tuple[Output, ...]:
        """These with size and etag: known by now, or asked for."""
        known = {_file(output): output for task in self._tasks for output in await task if output.etag}
        outputs = tuple(
            replace(output, size=same.size, etag=same.etag) if same is not None else output
            for output, same in ((output, known.get(_file(output))) for output in found)
        )
        if any(output.filename and output.size is None for output in outputs):
            return await self._measure(found)
        return outputs

    async def aclose(self) -> None:
        """Nobody asks any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def measure(client: ComfyUIClient, root: Path | None, outputs: Sequence[Output]) -> tuple[Output, ...]:
    """The same outputs with size and etag. `root` is ComfyUI's output folder where it is on this machine."""
    measured = list(outputs)
    if root is not None and any(output.filename for output in outputs):
        measured = await asyncio.to_thread(_measure_local, root, outputs)
    return tuple(
        [
            await _measure_remote(client, output) if output.filename and output.size is None else output
            for output in measured
        ]
    )


def folder_of(outputs: Path, folder: str) -> Path:
    """ComfyUI keeps `temp` and `input` beside its `output` folder."""
    return outputs if folder == "output" else outputs.parent / folder


def local_etag(size: int, mtime_ns: int) -> str:
    """The same text that aiohttp's FileResponse, and so ComfyUI's /view, gives for the file."""
    return f"{mtime_ns:x}-{size:x}"


def with_run_url(output: Output, workflow_id: str, n: int) -> Output:
    """Where this service serves it as the n-th output of the run (CONTRACT 5)."""
    if output.filename is None:
        return output
    return replace(output, url=f"/v1/comfyui/workflow/{quote(workflow_id)}/outputs/{n}")


def with_folder_url(output: Output, backend: str) -> Output:
    """Before the verdict an output has no number in the run yet: it is named by its folder and backend."""
    if output.filename is None:
        return output
    path = f"{output.subfolder}/{output.filename}" if output.subfolder else output.filename
    query = urlencode({"backend": backend, "type": output.type or "output"})
    return replace(output, url=f"/v1/comfyui/output/{quote(path)}?{query}")


def _file(output: Output) -> tuple[str | None, ...]:
    return output.node_id, output.type, output.subfolder, output.filename


def _measure_local(root: Path, outputs: Sequence[Output]) -> list[Output]:
    return [_measure_one(root, output) if output.filename else output for output in outputs]


def _measure_one(root: Path, output: Output) -> Output:
    try:
        found = (folder_of(root, output.type or "output") / (output.subfolder or "") / (output.filename or "")).stat()
    except (OSError, ValueError):
        return output
    return replace(output, size=found.st_size, etag=local_etag(found.st_size, found.st_mtime_ns))


async def _measure_remote(client: ComfyUIClient, output: Output) -> Output:
    try:
        found = await describe_remote(
            client, name=output.filename or "", subfolder=output.subfolder or "", folder=output.type or "output"
        )
    except (NotFound, BackendUnavailable):
        return output
    return replace(output, size=found.size, etag=found.etag.strip('"'))
