"""The file behind an output of a run, on this machine or on a backend's, bound to the bytes the run wrote.

Must never serve other bytes under the name of a run: two backends, or one after a clean-up, use the same names again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from managers.comfyui.backend import Backend
from managers.comfyui.measuring import folder_of
from managers.comfyui.remote_file import RemoteFile, describe_remote
from managers.errors import Conflict, Gone, InvalidRequest, NotFound
from managers.events.types import Finding, Output
from managers.files import OutputFile
from managers.files.outputs import describe
from managers.workflows.linking import Linking
from managers.workflows.store import WorkflowStore


class OutputDoor:
    """Opens outputs of every backend, and says where they may be deleted."""

    def __init__(self, store: WorkflowStore, backends: Sequence[Backend], links: Linking | None = None) -> None:
        """`links`: who knows where outputs were uploaded to."""
        self._store = store
        self._links = links
        self._backends = {backend.name: backend for backend in backends}

    async def of_workflow(self, workflow_id: str, n: int) -> Output:
        """The n-th output of a run, from 0. Raises `NotFound`."""
        workflow = await self._store.get(workflow_id)
        if not 0 <= n < len(workflow.outputs):
            raise NotFound(f"Workflow {workflow_id} has {len(workflow.outputs)} outputs, so there is no number {n}")
        return workflow.outputs[n]

    async def open(self, workflow_id: str, output: Output) -> OutputFile | RemoteFile:
        """The file of an output. Raises `NotFound`, `Gone` when its bytes are others now, `BackendUnavailable`."""
        workflow = await self._store.get(workflow_id)
        path = f"{output.subfolder}/{output.filename}" if output.subfolder else output.filename or ""
        file = await self._open(self._backend(workflow.backend), path, output.type or "output")
        if output.etag is not None and file.etag.strip('"') != output.etag:
            raise Gone("Another run has written this file since: the output of this run is gone")
        return file

    async def link(self, workflow_id: str, n: int) -> str | None:
        """A link to where the n-th output was uploaded to; None: it was not. Raises `StoreUnavailable`."""
        return None if self._links is None else await self._links.link(workflow_id, n)

    async def on_backend(self, backend: str | None, path: str, folder: str) -> OutputFile | RemoteFile:
        """A file below a folder (`output`, `temp`, `input`) of a backend; without one, of the first.

        Raises `NotFound`, `InvalidRequest`, `BackendUnavailable`.
        """
        if folder not in ("output", "temp", "input"):
            raise InvalidRequest("type is output, temp or input")
        return await self._open(self._named(backend), path, folder)

    def folder_to_delete_in(self, backend: str | None, folder: str) -> Path:
        """The folder that `on_backend` reads from, where it is ours to change.

        Raises `InvalidRequest`, and `Conflict` where it is another machine's, or is not for what runs wrote.
        """
        found = self._named(backend)
        if folder not in ("output", "temp"):
            raise Conflict(f"Files of the type {folder} are not what a run wrote: they are not deleted here", folder)
        if found.config.outputs is None:
            raise Conflict(
                f"The folders of the backend {found.name} are not known to be on this machine: delete it there",
                "elsewhere",
            )
        return folder_of(found.config.outputs, folder)

    def _named(self, backend: str | None) -> Backend:
        if backend is None:
            return next(iter(self._backends.values()))
        if backend not in self._backends:
            known = list(self._backends)
            message = f"There is no backend named {backend[:64]!r}; known: {', '.join(known)}"
            raise InvalidRequest(
                message, [Finding(code="unknown_backend", message=message, input="backend", allowed=known)]
            )
        return self._backends[backend]

    def _backend(self, name: str | None) -> Backend:
        if name not in self._backends:
            raise NotFound(f"The backend {name!r} that ran it is no longer configured")
        return self._backends[name]

    async def _open(self, backend: Backend, path: str, folder: str) -> OutputFile | RemoteFile:
        root = backend.config.outputs
        if root is not None:
            with suppress(NotFound):  # our folder may not be the one this ComfyUI writes to: ask it
                return await asyncio.to_thread(describe, folder_of(root, folder), path)
        subfolder, _, name = path.rpartition("/")
        if ".." in path.split("/") or "\0" in path or path.startswith("/"):
            raise NotFound("Output not found")
        return await describe_remote(backend.client, name=name, subfolder=subfolder, folder=folder)
