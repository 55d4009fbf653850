"""The S3 destination: what a run made lies in a bucket, with a `metadata.json` beside it that says how.

Must never hold up a workflow, and never say that something is there before the record says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import msgspec
import structlog
from msgspec import Struct

from managers.comfyui.remote_file import RemoteFile
from managers.delivery import s3_names
from managers.delivery.port import Again, Delivered, Delivery, Outcome, Refused
from managers.delivery.s3_bucket import BucketTrouble
from managers.delivery.s3_metadata import metadata
from managers.delivery.s3_uploader import Outputs, Report, Uploader
from managers.errors import Gone, NotFound, Unavailable
from managers.events.log import StoredFrame
from managers.events.types import Output
from managers.workflows.course import NodeTime
from managers.workflows.model import Workflow

log = structlog.get_logger(__name__)

SCHEDULE = (5, 30, 120, 600, 1800, 3600, 7200, 14400, 28800, 43200, 86400, 86400, 86400)
"""Seconds before the second, third … try: five days, for whoever has to mend a bucket or a key."""


class _Completed(Struct, frozen=True):
    """What counts of workflow:completed."""

    outputs: tuple[Output, ...] = ()


_completed = msgspec.json.Decoder(_Completed)


class Runs(Protocol):
    """What the record knows of a run."""

    async def get(self, workflow_id: str) -> Workflow:
        """Raises `NotFound`."""
        ...

    async def graph(self, workflow_id: str) -> tuple[bytes, bytes | None]:
        """The graph as JSON text, and what is no business of ours. Raises `NotFound`."""
        ...

    async def node_times(self, workflow_id: str) -> Sequence[NodeTime]:
        """When its nodes ran."""
        ...


class S3Destination:
    """See `managers.delivery.port.Destination`. `delete_local`: what is in the bucket is removed here."""

    name = "s3"
    kind = "s3"
    schedule: Sequence[float] = SCHEDULE
    batch = 1

    def __init__(
        self, uploader: Uploader, *, runs: Runs, outputs: Outputs, parallel: int, delete_local: bool = False
    ) -> None:
        self.parallel = parallel
        self._uploader = uploader
        self._runs = runs
        self._outputs = outputs
        self._delete_local = delete_local

    def wants(self, event: StoredFrame) -> bool:
        """Runs that made something, or may have."""
        return event.type == "workflow:completed"

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Outcome]:
        """Upload all outputs of each run, then its metadata.json."""
        return [await self._deliver(delivery) for delivery in deliveries]

    async def before_complete(self, workflow_id: str, outputs: Sequence[Output], seconds: float) -> None:
        """Upload these so that links are there when the run is told to be complete; what is not there in time is
        for `deliver`.
        """
        try:
            async with asyncio.timeout(seconds):
                report = await self._uploader.upload(workflow_id, outputs)
            if report.trouble is not None:
                log.warning("not uploaded yet", workflow_id=workflow_id, reason=report.trouble)
        except TimeoutError:
            log.warning("not uploaded yet", workflow_id=workflow_id, reason=f"it takes more than {seconds:g} s")
        except (NotFound, Unavailable) as error:
            log.warning("not uploaded yet", workflow_id=workflow_id, reason=str(error))
        except Exception:
            log.exception("uploading failed", workflow_id=workflow_id)

    async def _deliver(self, delivery: Delivery) -> Outcome:
        workflow_id = delivery.event.workflow_id or ""
        try:
            outputs = _completed.decode(delivery.event.data).outputs
            if not outputs:
                return Delivered()
            report = await self._uploader.upload(workflow_id, outputs)
            if report.trouble is not None:
                return Again(report.trouble)
            await self._describe(workflow_id, outputs, report)
            if self._delete_local:
                for n in report.uploads:
                    await self._remove(workflow_id, outputs[n])
        except NotFound as error:
            return Refused(str(error))
        except (BucketTrouble, Unavailable) as error:
            return Again(str(error))
        except Exception as error:
            log.exception("uploading failed", workflow_id=workflow_id)
            return Again(f"a fault of ours ({type(error).__name__})")
        if report.lost:
            files = len(report.lost) + len(report.uploads)
            return Refused(f"{len(report.lost)} of {files} outputs are gone: {next(iter(report.lost.values()))}")
        return Delivered()

    async def _describe(self, workflow_id: str, outputs: Sequence[Output], report: Report) -> None:
        """Write metadata.json, the last of all: who finds it finds the rest."""
        workflow = await self._runs.get(workflow_id)
        graph, _ = await self._runs.graph(workflow_id)
        body = await asyncio.to_thread(
            metadata, workflow, graph, await self._runs.node_times(workflow_id), outputs, report
        )
        key = f"{self._uploader.folder(workflow_id)}/{s3_names.METADATA}"
        await self._uploader.bucket.put(key, body, size=len(body), attributes={"Content-Type": "application/json"})

    async def _remove(self, workflow_id: str, output: Output) -> None:
        """The very file that was uploaded, where it is on this machine."""
        try:
            file = await self._outputs.open(workflow_id, output)
            if not isinstance(file, RemoteFile):
                await asyncio.to_thread(file.place.unlink, missing_ok=True)
        except (Gone, NotFound):
            pass  # it went before, or the name is another run's by now
        except (OSError, Unavailable) as error:
            log.warning("a local copy stays", workflow_id=workflow_id, reason=type(error).__name__)
