"""A file of a ComfyUI that is not on this machine, through its /view (PROTOCOL §2).

Must never read more than was asked for: a video of a gigabyte is passed on in pieces.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from email.utils import parsedate_to_datetime

import httpx
from msgspec import Struct

from managers.comfyui.client import ComfyUIClient
from managers.errors import BackendUnavailable, Gone, NotFound

_CHUNK = 256 * 1024


class RemoteFile(Struct, frozen=True, kw_only=True):
    """What /view said of a file just now. `size` in bytes, `etag` with its quotes, `modified_at` epoch seconds."""

    client: ComfyUIClient
    name: str
    subfolder: str
    folder: str
    size: int
    etag: str
    modified_at: int

    async def read(self, start: int, length: int, *, patience: float | None = None) -> AsyncGenerator[bytes, None]:
        """Yield `length` bytes from `start`; `patience` as in `ComfyUIClient.view`.

        Raises `Gone` when it is another file now, `BackendUnavailable`.
        """
        headers = {"range": f"bytes={start}-{start + length - 1}"}
        async with self.client.view(
            filename=self.name, subfolder=self.subfolder, folder=self.folder, headers=headers, patience=patience
        ) as reply:
            if reply.status_code not in (200, 206) or (reply.headers.get("etag") or self.etag) != self.etag:
                raise Gone("The output changed while it was being opened")
            skip = start if reply.status_code == 200 else 0
            try:
                async for chunk in reply.aiter_bytes(_CHUNK):
                    piece = chunk[skip : skip + length]
                    skip = max(0, skip - len(chunk))
                    length -= len(piece)
                    if piece:
                        yield piece
                    if length <= 0:
                        return
            except httpx.HTTPError as error:
                raise BackendUnavailable("ComfyUI broke off while sending the output") from error


async def describe_remote(client: ComfyUIClient, *, name: str, subfolder: str, folder: str) -> RemoteFile:
    """Ask for the facts with HEAD. Raises `NotFound`, `BackendUnavailable`."""
    async with client.view(filename=name, subfolder=subfolder, folder=folder, headers={}, head=True) as reply:
        if reply.status_code != 200:
            raise NotFound("ComfyUI has no such output (any more)")
        size = reply.headers.get("content-length", "")
        if not size.isdigit():
            raise BackendUnavailable("ComfyUI does not tell how large the output is")
        modified = reply.headers.get("last-modified")
        modified_at = int(parsedate_to_datetime(modified).timestamp()) if modified else 0
        etag = reply.headers.get("etag") or f'"{modified_at:x}-{int(size):x}"'
    return RemoteFile(
        client=client,
        name=name,
        subfolder=subfolder,
        folder=folder,
        size=int(size),
        etag=etag,
        modified_at=modified_at,
    )
