"""Files that are put into ComfyUI by hand, before a workflow names them.

Must never overwrite anything: each goes into a folder of its own.
"""

from __future__ import annotations

import asyncio
import mimetypes
import re
from collections.abc import Sequence

import structlog
from msgspec import Struct

from managers.clock import IdMaker
from managers.comfyui.backend import Backend
from managers.comfyui.client import UploadRefused
from managers.comfyui.media import media_in
from managers.comfyui.preparing import InputConfig
from managers.comfyui.spool import Spool
from managers.errors import BackendUnavailable, InvalidRequest, TooLarge
from managers.events.types import Finding

log = structlog.get_logger(__name__)

FOLDER = "uploads"
_MAX_NAME = 100
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class UploadedInput(Struct, frozen=True, kw_only=True, rename="camel"):
    """`name` is what a loader takes, on each of `backends`; `size` in bytes."""

    name: str
    backends: tuple[str, ...]
    size: int
    content_type: str


class InputDoor:
    """Takes files for the backends."""

    def __init__(self, config: InputConfig, backends: Sequence[Backend], *, new_id: IdMaker) -> None:
        self._config = config
        self._backends = {backend.name: backend for backend in backends}
        self._new_id = new_id

    def check(self, backend: str | None) -> None:
        """Whether there is somebody to take a file: known before it is read.

        Raises `InvalidRequest`, `BackendUnavailable`.
        """
        self._those(backend)

    def new_spool(self) -> Spool:
        """For what comes in."""
        return Spool(self._config.spool, self._config.max_bytes)

    async def upload(self, spool: Spool, filename: str, backend: str | None = None) -> UploadedInput:
        """Put a file into the input folder of this backend; without one, of every backend that is up.

        A workflow may run on any. Raises `InvalidRequest`, `TooLarge`, `BackendUnavailable` when nobody took it.
        """
        if not spool.size:
            raise InvalidRequest("The file is empty")
        name = safe_name(filename)
        media = media_in(spool.head)
        kind = media.type if media is not None else mimetypes.guess_type(name)[0] or "application/octet-stream"
        subfolder = f"{FOLDER}/{self._new_id()}"
        backends = self._those(backend)
        answers = await asyncio.gather(
            *(each.client.upload(spool, filename=name, subfolder=subfolder, content_type=kind) for each in backends),
            return_exceptions=True,
        )
        taken = [one.name for one, answer in zip(backends, answers, strict=True) if isinstance(answer, str)]
        for one, answer in zip(backends, answers, strict=True):
            if isinstance(answer, BackendUnavailable | TooLarge | UploadRefused):
                log.warning("an input was not taken", backend=one.name, reason=str(answer))
            elif isinstance(answer, BaseException):
                raise answer
        if not taken:
            failure = next(answer for answer in answers if isinstance(answer, Exception))
            raise BackendUnavailable(str(failure)) if isinstance(failure, UploadRefused) else failure
        found = next(answer for answer in answers if isinstance(answer, str))
        return UploadedInput(name=found, backends=tuple(taken), size=spool.size, content_type=kind)

    def _those(self, name: str | None) -> list[Backend]:
        if name is not None and name not in self._backends:
            known = list(self._backends)
            message = f"There is no backend named {name[:64]!r}; known: {', '.join(known)}"
            raise InvalidRequest(
                message, [Finding(code="unknown_backend", message=message, input="backend", allowed=known)]
            )
        up = [one for one in self._backends.values() if one.up and name in (None, one.name)]
        if not up:
            raise BackendUnavailable(
                "No ComfyUI is there to take the file" if name is None else f"The backend {name} is not there now"
            )
        return up


def safe_name(filename: str) -> str:
    """The last part of a name in letters, digits and `._-`, its end kept: `../Mein Bild.PNG` is `Mein_Bild.PNG`."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    stem, dot, ending = _UNSAFE.sub("_", last).lstrip(".").rpartition(".")
    if not dot:
        stem, ending = ending, ""
    ending = f".{ending[:16]}" if ending else ""
    return (stem[: _MAX_NAME - len(ending)] or "file") + ending
