"""The live page at `/dashboard`: files of ours, for everybody. What they show is behind the key.

Must never serve anything but the files it found at the start, and never fill anything into them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from litestar import Request, Response, get
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from msgspec import Struct

PATH = "/dashboard"
_PAGE = "index.html"

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}


class _File(Struct, frozen=True):
    """One file in memory. `etag` with its quotes."""

    body: bytes
    media_type: str
    etag: str


def dashboard_routes(folder: Path) -> list[HTTPRouteHandler]:
    """The page and its files, read now from this folder: those a browser asks for, by their endings."""
    files = {path.relative_to(folder).as_posix(): _read(path) for path in folder.rglob("*") if path.suffix in _TYPES}

    @get(PATH, include_in_schema=False)
    async def dashboard(request: Request[Any, Any, Any]) -> Response[bytes]:
        """The page."""
        return _reply(request, files[_PAGE])

    @get(PATH + "/{name:path}", include_in_schema=False)
    async def dashboard_file(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
        """What it is made of."""
        found = files.get(name.lstrip("/"))
        if found is None:
            raise NotFoundException("There is no such file")
        return _reply(request, found)

    return [dashboard, dashboard_file]


def _read(path: Path) -> _File:
    body = path.read_bytes()
    return _File(body, _TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:24]}"')


def _reply(request: Request[Any, Any, Any], file: _File) -> Response[bytes]:
    # Asked for anew each time, or modules of two versions meet; the ETag makes that cheap.
    headers = {"etag": file.etag, "cache-control": "no-cache", "content-security-policy": _POLICY}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(b"", status_code=304, headers=headers, media_type=file.media_type)
    return Response(file.body, headers=headers, media_type=file.media_type)
