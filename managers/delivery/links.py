"""Links to what was uploaded, made when something is read or sent: what is stored has only keys.

So a link is alive whenever it is told, days later too. Must never name an address that only we can reach, never be
in the way (without a link the output is told as it was before), and never log a link.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from managers.clock import Clock
from managers.delivery.uploads import Upload, UploadBooks
from managers.events.log import EventLog, StoredFrame
from managers.events.types import Output, StoredEvent, UploadCompleted, WorkflowCompleted
from managers.workflows.model import Workflow

log = structlog.get_logger(__name__)

_REMEMBERED = 4096
_LINKED = {"workflow:completed", "upload:completed"}
_event: msgspec.json.Decoder[WorkflowCompleted | UploadCompleted] = msgspec.json.Decoder(
    WorkflowCompleted | UploadCompleted
)
_encode = msgspec.json.Encoder().encode


class LinkConfig(Struct, frozen=True, kw_only=True):
    """`base` is a public address of `bucket` or of the CDN before it; without one links are signed, for
    `ttl_seconds`.
    """

    bucket: str
    base: str | None = None
    ttl_seconds: int = 86_400


class Link(Struct, frozen=True):
    """An address, and when it ends (epoch ms; None: never)."""

    url: str
    expires_at: int | None


class CannotSign(Exception):
    """There is no link now."""


class Signer(Protocol):
    """Makes links that read objects without a key."""

    async def sign(self, bucket: str, keys: Sequence[str], seconds: int) -> Sequence[str]:
        """One for each key, alive for so many seconds. Raises `CannotSign`."""
        ...


class Links:
    """Finds out what was uploaded, and tells it with links."""

    def __init__(self, config: LinkConfig, *, signer: Signer, books: UploadBooks, clock: Clock) -> None:
        self._config = config
        self._signer = signer
        self._books = books
        self._clock = clock
        self._links: OrderedDict[tuple[str, str], Link] = OrderedDict()
        self._recent: OrderedDict[tuple[str, int], Upload] = OrderedDict()

    async def prepare(self, upload: Upload) -> None:
        """Its event is about to be stored: have the link ready for `live`."""
        await self._links_of([upload])
        self._recent[upload.workflow_id, upload.n] = upload
        _trim(self._recent)

    def live(self, pairs: Sequence[tuple[StoredEvent, StoredFrame]]) -> Sequence[tuple[StoredEvent, StoredFrame]]:
        """What was just committed, with the links that are ready. At once, from memory."""
        if not any(frame.type in _LINKED for _, frame in pairs):
            return pairs
        return [self._alive(event, frame) for event, frame in pairs]

    async def link(self, workflow_id: str, n: int) -> str | None:
        """To one output; None: it was not uploaded, or there is no link now. Raises `StoreUnavailable`."""
        upload = (await self._books.of([workflow_id])).get(workflow_id, {}).get(n)
        if upload is None:
            return None
        link = (await self._links_of([upload])).get((upload.bucket, upload.key))
        return None if link is None else link.url

    async def linked(self, workflows: Sequence[Workflow]) -> Sequence[Workflow]:
        """The same with links to their outputs. Raises `StoreUnavailable`."""
        uploads, links = await self._known([one.id for one in workflows if one.outputs])
        return [
            replace(one, outputs=_outputs(one.outputs, uploads[one.id], links)) if one.id in uploads else one
            for one in workflows
        ]

    async def dressed(self, frames: Sequence[StoredFrame]) -> list[StoredFrame]:
        """The same with links, where they tell of outputs that were uploaded. Raises `StoreUnavailable`."""
        concerned = {frame.workflow_id for frame in frames if frame.type in _LINKED and frame.workflow_id}
        if not concerned:
            return list(frames)
        uploads, links = await self._known(concerned)
        return [
            _dressed(frame, uploads[frame.workflow_id], links)
            if frame.type in _LINKED and frame.workflow_id in uploads
            else frame
            for frame in frames
        ]

    def log(self, source: EventLog) -> EventLog:
        """The log as clients read it: with links."""
        return LinkedLog(source, self)

    # ---- inside

    async def _known(
        self, workflow_ids: Collection[str]
    ) -> tuple[dict[str, dict[int, Upload]], dict[tuple[str, str], Link]]:
        uploads = await self._books.of(workflow_ids) if workflow_ids else {}
        return uploads, await self._links_of([upload for of in uploads.values() for upload in of.values()])

    async def _links_of(self, uploads: Iterable[Upload]) -> dict[tuple[str, str], Link]:
        """By bucket and key."""
        found: dict[tuple[str, str], Link] = {}
        unsigned: dict[str, list[str]] = {}
        for upload in uploads:
            link = self._at_hand(upload)
            if link is not None:
                found[upload.bucket, upload.key] = link
            else:
                unsigned.setdefault(upload.bucket, []).append(upload.key)
        for bucket, keys in unsigned.items():
            found |= await self._signed(bucket, keys)
        return found

    def _at_hand(self, upload: Upload) -> Link | None:
        """A public one, or one that was signed before and has half of its time left: clients may cache by it."""
        if self._config.base is not None and upload.bucket == self._config.bucket:
            return Link(f"{self._config.base}/{quote(upload.key)}", None)
        known = self._links.get((upload.bucket, upload.key))
        enough = self._clock.now_ms() + self._config.ttl_seconds * 500
        return known if known is not None and (known.expires_at or 0) > enough else None

    async def _signed(self, bucket: str, keys: Sequence[str]) -> dict[tuple[str, str], Link]:
        expires_at = self._clock.now_ms() + self._config.ttl_seconds * 1000
        try:
            urls = await self._signer.sign(bucket, keys, self._config.ttl_seconds)
        except CannotSign as error:
            log.warning("no links to what was uploaded", reason=str(error))
            return {}
        found = {(bucket, key): Link(url, expires_at) for key, url in zip(keys, urls, strict=True)}
        self._links |= found
        for place in found:
            self._links.move_to_end(place)
        _trim(self._links)
        return found

    def _alive(self, event: StoredEvent, frame: StoredFrame) -> tuple[StoredEvent, StoredFrame]:
        match event:
            case UploadCompleted():
                numbers: Iterable[int] = [event.n]
            case WorkflowCompleted():
                numbers = range(len(event.outputs))
            case _:
                return event, frame
        uploads = {n: found for n in numbers if (found := self._recent.get((str(event.workflow_id), n)))}
        links = {(one.bucket, one.key): link for one in uploads.values() if (link := self._at_hand(one))}
        if not links:
            return event, frame
        told = _with_links(event, uploads, links)
        return told, replace(frame, data=_encode(told))


class LinkedLog:
    """The log as clients read it: with links."""

    def __init__(self, source: EventLog, links: Links) -> None:
        self._source = source
        self._links = links

    @property
    def last_seq(self) -> int:
        """See the port."""
        return self._source.last_seq

    async def first_seq(self) -> int:
        """See the port."""
        return await self._source.first_seq()

    async def events_after(self, seq: int, limit: int) -> Sequence[StoredFrame]:
        """See the port."""
        return await self._links.dressed(await self._source.events_after(seq, limit))

    async def events_of(self, workflow_id: str, after: int = 0) -> Sequence[StoredFrame]:
        """See the port."""
        return await self._links.dressed(await self._source.events_of(workflow_id, after))


def _dressed(frame: StoredFrame, uploads: Mapping[int, Upload], links: Mapping[tuple[str, str], Link]) -> StoredFrame:
    return replace(frame, data=_encode(_with_links(_event.decode(frame.data), uploads, links)))


def _with_links(
    event: WorkflowCompleted | UploadCompleted, uploads: Mapping[int, Upload], links: Mapping[tuple[str, str], Link]
) -> WorkflowCompleted | UploadCompleted:
    if isinstance(event, WorkflowCompleted):
        return replace(event, outputs=_outputs(event.outputs, uploads, links))
    upload = uploads.get(event.n)
    if upload is None:
        return event
    output = _output(event.output, upload, links)
    return replace(event, output=output, url=output.url, url_expires_at=output.url_expires_at)


def _outputs(
    outputs: Sequence[Output], uploads: Mapping[int, Upload], links: Mapping[tuple[str, str], Link]
) -> tuple[Output, ...]:
    return tuple(_output(one, uploads[n], links) if n in uploads else one for n, one in enumerate(outputs))


def _output(output: Output, upload: Upload, links: Mapping[tuple[str, str], Link]) -> Output:
    output = replace(output, key=upload.key, sha256=upload.sha256, size=upload.size)
    link = links.get((upload.bucket, upload.key))
    if link is None:
        return output
    return replace(output, url=link.url, url_expires_at=link.expires_at, local_url=output.local_url or output.url)


def _trim(memory: OrderedDict[Any, Any]) -> None:
    while len(memory) > _REMEMBERED:
        memory.popitem(last=False)
