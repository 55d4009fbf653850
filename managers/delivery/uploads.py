"""What is kept about uploads: where in which bucket each output of a run lies. Links are no part of it.

Must never name a database. A record and the event that tells of it are one transaction, so that whatever is repeated
after a crash is told once.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from msgspec import Struct

from managers.events.types import UploadCompleted, UploadFailed


class Upload(Struct, frozen=True, kw_only=True):
    """The n-th output of a run as it lies in a bucket. `size` in bytes, `sha256` in hex, the time epoch ms."""

    workflow_id: str
    n: int
    bucket: str
    key: str
    sha256: str
    size: int
    uploaded_at: int


class UploadBooks(Protocol):
    """The records. All of it may raise `StoreUnavailable`."""

    async def completed(self, upload: Upload, event: UploadCompleted) -> bool:
        """Write both. False: it was on record already, and nothing is told. Raises `NotFound` for its workflow."""
        ...

    async def failed(self, event: UploadFailed, *, bucket: str) -> bool:
        """The output will never be uploaded. False: it was, or this was told before. Raises `NotFound`."""
        ...

    async def of(self, workflow_ids: Collection[str]) -> dict[str, dict[int, Upload]]:
        """What was uploaded, by workflow and number; workflows without an upload are left out."""
        ...
