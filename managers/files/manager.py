"""`Files`: what the routes call to list, open and delete below the configured folders.

Must never block the event loop: the index has a thread of its own, other looks at the disk go to the pool.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
from msgspec import Struct

from managers.errors import Conflict, InvalidRequest, NotFound, Unavailable
from managers.events.types import Finding
from managers.files.index import IndexedFile, IndexPage, Key, OutputsIndex
from managers.files.models import Model, ModelType, find_models
from managers.files.outputs import OutputFile, describe, extension

T = TypeVar("T")

UNKNOWN = "unknown"
"""The workflow of a file that no run reported."""

MAX_LIMIT = 1000
_DISK_TIMEOUT = (
    60.0  # the first scan of a full, cold, slow disk; a dead network mount must not hold requests for ever
)


class FilesConfig(Struct, frozen=True, kw_only=True):
    """Where things lie. A type of model without a folder has no models."""

    outputs: Path
    models: dict[ModelType, Path]


class OutputOwner(Protocol):
    """The run that reported a file last."""

    @property
    def workflow_id(self) -> str:
        """Its workflow."""
        ...

    @property
    def node_id(self) -> str | None:
        """The node that wrote the file, where known."""
        ...


class OutputOwners(Protocol):
    """Who wrote what, by the record of runs. Paths are `subfolder/filename`, relative to this outputs folder."""

    async def workflows_of(self, paths: Sequence[str]) -> Mapping[str, OutputOwner]:
        """The last run that reported each path; paths nobody reported are left out."""
        ...

    async def paths_of(self, workflow_id: str) -> Sequence[str]:
        """What a workflow wrote into this folder (type output); empty when it is unknown."""
        ...


class OutputEntry(Struct, frozen=True, kw_only=True):
    """One file. `type` is its extension, `size` in bytes, `created_at` the last write in epoch ms."""

    path: str
    filename: str
    subfolder: str
    workflow_id: str
    node_id: str | None
    type: str
    size: int
    created_at: int


class OutputsPage(Struct, frozen=True):
    """A page of the listing; give `next_cursor` back for the next one."""

    outputs: tuple[OutputEntry, ...]
    next_cursor: str | None


class Files:
    """Models and outputs. Close it when the service stops."""

    def __init__(self, config: FilesConfig, owners: OutputOwners) -> None:
        self._config = config
        self._owners = owners
        self._index = OutputsIndex(config.outputs)
        self._index_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outputs-index")

    def close(self) -> None:
        """Take no more work. A look at the disk under way ends by itself."""
        self._index_thread.shutdown(wait=False, cancel_futures=True)

    async def list_models(self, wanted: ModelType | None = None) -> list[Model]:
        """All models, or those of one type (CONTRACT 5). Raises `Unavailable` when the disk does not answer."""
        return await self._on_disk(None, lambda: find_models(self._config.models, wanted))

    async def list_outputs(
        self, *, workflow_id: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> OutputsPage:
        """Files newest first; with `workflow_id` only those it reported, filtered before the limit.

        A file keeps its place while a client pages: what comes or goes meanwhile moves nothing else.
        Raises `InvalidRequest` for a limit outside 1..1000 or a cursor that is none, `Unavailable`.
        """
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidRequest(f"limit must be 1 to {MAX_LIMIT}")
        after = _decode_cursor(cursor) if cursor is not None else None
        only: set[str] | None = None
        if workflow_id is not None:
            # A name may have been written again by a later run: the file belongs to that one now.
            paths = await self._owners.paths_of(workflow_id)
            owners = await self._owners.workflows_of(paths)
            only = {path for path, owner in owners.items() if owner.workflow_id == workflow_id}
        page = await self._on_disk(self._index_thread, lambda: self._index.page(limit, after, only))
        return await self._with_owners(page)

    async def open_output(self, path: str) -> OutputFile:
        """What is at `path` below the outputs folder, ready for `read`. Raises `NotFound`, `Unavailable`."""
        return await self._on_disk(None, lambda: describe(self._config.outputs, path))

    async def delete_output(self, path: str, folder: Path | None = None) -> None:
        """Remove the file below `folder` (None: the outputs folder), or the link if `path` is one.

        Raises `NotFound`, `Conflict`, `Unavailable`.
        """
        await self._on_disk(None, lambda: _delete(folder or self._config.outputs, path))

    async def _with_owners(self, page: IndexPage) -> OutputsPage:
        owners = await self._owners.workflows_of([file.path for file in page.files]) if page.files else {}
        return OutputsPage(
            outputs=tuple(_entry(file, owners.get(file.path)) for file in page.files),
            next_cursor=_encode_cursor(page.last) if page.last is not None else None,
        )

    async def _on_disk(self, executor: ThreadPoolExecutor | None, look: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(_DISK_TIMEOUT):
                return await asyncio.get_running_loop().run_in_executor(executor, look)
        except OSError as error:  # TimeoutError is one too
            raise Unavailable("The folder cannot be read now") from error


def _delete(folder: Path, path: str) -> None:
    describe(folder, path)
    try:
        (folder / path).unlink()
    except FileNotFoundError as error:
        raise NotFound("Output not found") from error
    except PermissionError as error:
        raise Conflict("The folder does not let this service delete", "read-only") from error


def _entry(file: IndexedFile, owner: OutputOwner | None) -> OutputEntry:
    subfolder, _, filename = file.path.rpartition("/")
    return OutputEntry(
        path=file.path,
        filename=filename,
        subfolder=subfolder,
        workflow_id=owner.workflow_id if owner else UNKNOWN,
        node_id=owner.node_id if owner else None,
        type=extension(filename),
        size=file.size,
        created_at=file.mtime_ns // 1_000_000,
    )


def _encode_cursor(key: Key) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def _decode_cursor(cursor: str) -> Key:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        mtime_ns, path = msgspec.json.decode(text, type=Key)
    except (binascii.Error, ValueError) as error:
        message = "The cursor is none that this service gave"
        raise InvalidRequest(message, [Finding(code="invalid_query", message=message, input="cursor")]) from error
    return mtime_ns, path
