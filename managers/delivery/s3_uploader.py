"""Brings the outputs of a run into the bucket, a few at a time, and writes each one down when it is there.

Must never upload again what is on record, nor tell of an upload that is not. A repeated upload writes the same key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import structlog
from msgspec import Struct
from msgspec.structs import replace

from managers.clock import Clock
from managers.comfyui.remote_file import RemoteFile
from managers.delivery import s3_names
from managers.delivery.links import Links
from managers.delivery.s3_bucket import Bucket, BucketTrouble
from managers.delivery.s3_content import DownloadConfig, content_of
from managers.delivery.uploads import Upload, UploadBooks
from managers.errors import Gone, NotFound, Unavailable
from managers.events.types import Output, UploadCompleted, UploadFailed
from managers.files import OutputFile, media_of

log = structlog.get_logger(__name__)

_OPEN_SECONDS = 30.0


class UploaderConfig(Struct, frozen=True, kw_only=True):
    """`prefix` of every key, how many outputs go up at once, and where those too large for memory wait."""

    prefix: str
    spool: Path
    concurrency: int = 4
    download: DownloadConfig = DownloadConfig()


class Outputs(Protocol):
    """Opens the outputs of runs."""

    async def open(self, workflow_id: str, output: Output) -> OutputFile | RemoteFile:
        """Raises `NotFound`, `Gone` when its bytes are others now, `BackendUnavailable`."""
        ...


class Report(Struct, frozen=True):
    """What came of it: by number what is in the bucket, and why something never will be; `trouble`: why the rest is
    not there yet.
    """

    uploads: dict[int, Upload]
    lost: dict[int, str]
    trouble: str | None


class Uploader:
    """All uploads of the service."""

    def __init__(
        self,
        config: UploaderConfig,
        *,
        bucket: Bucket,
        books: UploadBooks,
        links: Links,
        outputs: Outputs,
        clock: Clock,
    ) -> None:
        self.bucket = bucket
        self._config = config
        self._books = books
        self._links = links
        self._outputs = outputs
        self._clock = clock
        self._places = asyncio.Semaphore(config.concurrency)

    def folder(self, workflow_id: str) -> str:
        """Where the objects of a workflow lie."""
        return s3_names.folder(self._config.prefix, workflow_id)

    async def upload(self, workflow_id: str, outputs: Sequence[Output]) -> Report:
        """Bring there what is not there yet. After the first trouble nothing more is begun.

        Raises `StoreUnavailable`.
        """
        uploads = dict((await self._books.of([workflow_id])).get(workflow_id, {}))
        lost: dict[int, str] = {}
        trouble: list[str] = []

        async def one(n: int, name: str) -> None:
            async with self._places:  # not longer than bytes are on their way: the disk takes its time too
                if trouble:
                    return
                try:
                    upload = await self._put(workflow_id, n, outputs[n], name)
                except (Gone, NotFound) as error:
                    upload, lost[n] = None, str(error)
                except (BucketTrouble, Unavailable, TimeoutError) as error:
                    trouble.append(str(error) or "ComfyUI did not open the output in time")
                    return
            try:
                if upload is None:
                    await self._lose(workflow_id, n, outputs[n], lost[n])
                else:
                    await self._record(upload, outputs[n])
                    uploads[n] = upload
            except NotFound as error:  # the workflow was forgotten meanwhile
                lost[n] = str(error)
            except Unavailable as error:
                trouble.append(str(error))

        missing = {n: name for n, name in s3_names.names(outputs).items() if n not in uploads}
        async with asyncio.TaskGroup() as tasks:
            for n, name in missing.items():
                tasks.create_task(one(n, name))
        return Report(uploads, lost, trouble[0] if trouble else None)

    async def _put(self, workflow_id: str, n: int, output: Output, name: str) -> Upload:
        async with asyncio.timeout(_OPEN_SECONDS):
            file = await self._outputs.open(workflow_id, output)
        media = media_of(name)
        key = f"{self.folder(workflow_id)}/{name}"
        async with content_of(file, self._config.spool, self._config.download) as content:
            await self.bucket.put(
                key,
                content.body,
                size=content.size,
                attributes={
                    "Content-Type": media.type,
                    "Content-Disposition": s3_names.disposition(name, inline=media.inline),
                    "sha256": content.sha256,
                },
            )
        return Upload(
            workflow_id=workflow_id,
            n=n,
            bucket=self.bucket.name,
            key=key,
            sha256=content.sha256,
            size=content.size,
            uploaded_at=self._clock.now_ms(),
        )

    async def _record(self, upload: Upload, output: Output) -> None:
        await self._links.prepare(upload)
        event = UploadCompleted(
            timestamp=upload.uploaded_at,
            workflow_id=upload.workflow_id,
            n=upload.n,
            output=replace(output, key=upload.key, sha256=upload.sha256, size=upload.size),
        )
        await self._books.completed(upload, event)

    async def _lose(self, workflow_id: str, n: int, output: Output, reason: str) -> None:
        log.warning("an output cannot be uploaded", workflow_id=workflow_id, n=n, reason=reason)
        event = UploadFailed(
            timestamp=self._clock.now_ms(), workflow_id=workflow_id, n=n, output=output, error=reason, url=output.url
        )
        await self._books.failed(event, bucket=self.bucket.name)
